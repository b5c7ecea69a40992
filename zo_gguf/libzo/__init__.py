"""libzo, the native part, behind ctypes. What its calls mean is documented in native/zo.h."""

from zo_gguf.libzo.feedback import Feedback as Feedback
from zo_gguf.libzo.handles import Gain as Gain
from zo_gguf.libzo.handles import InPlace as InPlace
from zo_gguf.libzo.handles import LowRank as LowRank
from zo_gguf.libzo.handles import Store as Store
from zo_gguf.libzo.handles import Tensors as Tensors
from zo_gguf.libzo.hook import Hook as Hook
from zo_gguf.libzo.hook import Recorder as Recorder
from zo_gguf.libzo.library import Library as Library
from zo_gguf.libzo.library import address as address
from zo_gguf.libzo.library import load as load
from zo_gguf.libzo.library import pointer as pointer
from zo_gguf.libzo.quantize import Moments as Moments
from zo_gguf.libzo.quantize import requantize_blocks as requantize_blocks
from zo_gguf.libzo.signatures import AT_THETA as AT_THETA
from zo_gguf.libzo.signatures import FLOATS as FLOATS
from zo_gguf.libzo.signatures import INTS as INTS
from zo_gguf.libzo.signatures import NORMAL as NORMAL
from zo_gguf.libzo.signatures import ON_CPU as ON_CPU
from zo_gguf.libzo.signatures import PROTOTYPES as PROTOTYPES
from zo_gguf.libzo.signatures import RADEMACHER as RADEMACHER
from zo_gguf.libzo.signatures import BlockLayout as BlockLayout
from zo_gguf.libzo.signatures import Branch as Branch
from zo_gguf.libzo.signatures import Field as Field
from zo_gguf.libzo.signatures import Part as Part
from zo_gguf.libzo.signatures import Probe as Probe
