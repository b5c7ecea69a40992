"""Hooked losses and gradients against torch on the same dequantized weights, and against stock."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import numpy as np
import pytest

from tests.helpers import models, reference
from tests.helpers.tiny_gguf import random_delta, write_llama
from zo_gguf.data.dataset import Example
from zo_gguf.engine.attach import attach, detach
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask, MaskHeader
from zo_gguf.tuning.calibrate import measure_noise

N_PROBES = 24


def random_mask(gguf_path: Path, density: float, scale: float = 0.0, **extra: str) -> Mask:
    """Uniformly random positions in every linear weight, with random residuals."""
    rng = np.random.default_rng(0)
    file = GgufFile(gguf_path)
    tensors, residuals, shapes = {}, {}, {}
    for name, info in file.tensors.items():
        if name.startswith("blk.") and len(info.shape) == 2:
            size = info.shape[0] * info.shape[1]
            n = max(1, int(size * density))
            tensors[name] = np.sort(rng.choice(size, n, replace=False)).astype(np.int64)
            residuals[name] = (scale * rng.standard_normal(n)).astype(np.float32)
            shapes[name] = info.shape
    header = MaskHeader(gguf_path.name, file.sha256(), "random", density)
    return Mask(tensors, residuals, shapes, header)


def correlation(engine: Engine, model: object, examples: list, eps: float) -> float:
    """Engine's projected gradients against autograd's directional derivatives."""
    noises = [engine.noise(seed) for seed in range(N_PROBES)]
    mask = engine.delta
    exact = reference.directional_derivatives(model, examples, mask.tensors, mask.shapes, noises)
    probes = [Probe(seed, sign * eps) for seed in range(N_PROBES) for sign in (1, -1)]
    losses = engine.losses(examples, probes).mean(axis=1).reshape(-1, 2)
    slopes = (losses[:, 0] - losses[:, 1]) / (2 * eps)
    return float(np.corrcoef(slopes, exact)[0, 1])


@pytest.fixture(scope="module")
def rows(task_dir: Path) -> Callable[[Engine], list]:
    from zo_gguf.data.dataset import load_examples

    return lambda engine: load_examples(task_dir / "train.jsonl", engine)[:16]


@pytest.mark.parametrize(
    ("quant", "least"), [("F16", 0.999), ("Q8_0", 0.995), ("Q4_0", 0.995), ("Q4_K_M", 0.995)]
)
def test_projected_gradient_is_the_directional_derivative(
    quant: str, least: float, tiny_export: SimpleNamespace, tiny_llama_dir: Path, rows: Callable
) -> None:
    path = tiny_export.model(quant)
    with Engine(path, delta=tiny_export.mask(quant)) as engine:
        # The issue at hand is the gradient, so rows count their right choice only.
        from dataclasses import replace

        examples = [replace(row, choices=(), answer=-1) for row in rows(engine)]
        model = reference.torch_model(tiny_llama_dir, path)
        reference.add_delta(model, engine.delta.tensors, engine.delta.shapes, engine.theta())
        assert correlation(engine, model, examples, measure_noise(engine, examples).eps) >= least


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_losses_and_gradients_of_other_architectures(kind: str) -> None:
    converted = models.converted(kind)
    mask = random_mask(converted.gguf, 0.02, scale=0.05)
    with Engine(converted.gguf, delta=mask) as engine:
        prompt = [engine.vocabulary.bos_id] * engine.vocabulary.add_bos
        texts = [prompt + engine.vocabulary.tokenize(text) for text in models.sentences(6)]
        from zo_gguf.data.dataset import Example

        examples = [Example(t, [False] + [True] * (len(t) - 1)) for t in texts]
        model = reference.torch_model(converted.folder, converted.gguf)
        reference.add_delta(model, mask.tensors, mask.shapes, engine.theta())
        exact = [float(reference.torch_loss(model, e).detach()) for e in examples]
        np.testing.assert_allclose(engine.losses(examples)[0], exact, atol=3e-3)
        assert correlation(engine, model, examples, 1e-2) >= 0.999


def test_every_path_gives_the_same_losses(tiny_export: SimpleNamespace, rows: Callable) -> None:
    """Layouts, several probes in one decode, staged tensors, many decodes: F16, so little noise."""
    path, mask = tiny_export.model("F16"), tiny_export.mask("F16")
    probes = [Probe(1, 0.05), Probe(1, -0.05), Probe(2, 0.1)]
    variants = {
        "staged": {"force_staged": True},
        "two probes a decode": {"probes_per_decode": 2},
        "split": {"kv_layout": "split"},
        "split, three probes a decode": {"kv_layout": "split", "probes_per_decode": 3},
        "small decodes": {"ctx_tokens": 128},
        "one thread": {"n_threads": 1},
    }
    with Engine(path, delta=mask) as engine:
        examples = rows(engine)
        expected = engine.losses(examples, probes)
        assert np.abs(expected[0] - expected[1]).max() > 0.05  # the probes do something
        assert np.array_equal(engine.losses(examples, probes), expected)  # bit for bit
    for name, options in variants.items():
        with Engine(path, delta=mask, **options) as engine:
            losses = engine.losses(examples, probes)
            np.testing.assert_allclose(losses, expected, atol=5e-3, err_msg=name)
            if name in ("staged", "one thread"):
                assert np.array_equal(losses, expected), name


def test_choice_losses_match_torch(
    tiny_export: SimpleNamespace, tiny_llama_dir: Path, rows: Callable
) -> None:
    path = tiny_export.model("F16")
    model = reference.torch_model(tiny_llama_dir, path)
    with Engine(path) as engine:
        examples = rows(engine)
        exact = [float(reference.torch_loss(model, e).detach()) for e in examples]
        np.testing.assert_allclose(engine.losses(examples)[0], exact, atol=3e-3)


def test_theta_round_trip_and_noise(tiny_export: SimpleNamespace) -> None:
    with Engine(tiny_export.model("Q8_0"), delta=tiny_export.mask("Q8_0")) as engine:
        mask = Mask.load(tiny_export.mask("Q8_0"))
        assert np.array_equal(engine.theta(), mask.theta0())
        theta = np.linspace(-1, 1, engine.nnz).astype(np.float32)
        engine.set_theta(theta)
        assert np.array_equal(engine.theta(), theta)
        assert abs(float(engine.noise(3).std()) - 1) < 0.05
        with pytest.raises(ZoError, match="trainable"):
            engine.set_theta(theta[1:])
        theta[0] = np.nan
        with pytest.raises(ZoError, match="NaN"):
            engine.set_theta(theta)


def test_a_probe_that_breaks_leaves_nothing_behind(tiny_export: SimpleNamespace) -> None:
    """llama.cpp multiplies masked cells of its cache by 0, which NaN survives (from 64 tokens)."""
    short, long = (Example([*range(300, 300 + n)], [k > 0 for k in range(n)]) for n in (100, 120))
    with Engine(tiny_export.model("F16"), delta=tiny_export.mask("F16"), n_threads=1) as engine:
        before = engine.losses([short])
        assert np.isnan(engine.losses([long], [Probe(1, 1e4)])).all()
        np.testing.assert_array_equal(engine.losses([short]), before)


def test_a_weight_that_never_multiplies_is_named(
    tiny_export: SimpleNamespace, rows: Callable
) -> None:
    with Engine(tiny_export.model("F16"), delta=tiny_export.mask("F16")) as engine:
        store = engine.parameters._store
        store.add("blk.99.attn_q.weight", (2, 2), np.array([0]), np.zeros(1, np.float32))
        with pytest.raises(ZoError, match=r"never multiplied by: blk\.99\.attn_q\.weight"):
            engine.losses(rows(engine))


def test_embedding_masks_are_refused(tiny_export: SimpleNamespace) -> None:
    path = tiny_export.model("F16")
    file = GgufFile(path)
    name = "token_embd.weight"
    mask = Mask(
        {name: np.array([5], np.int64)},
        {name: np.zeros(1, np.float32)},
        {name: file.tensors[name].shape},
        MaskHeader(path.name, file.sha256(), "random", 0.1),
    )
    with pytest.raises(ZoError, match=r"embedding.*--exclude"):
        Engine(path, delta=mask)


def test_mask_of_another_base_is_refused(tiny_export: SimpleNamespace) -> None:
    with pytest.raises(ZoError, match=r"tiny-llama-Q8_0\.gguf"):
        Engine(tiny_export.model("Q4_0"), delta=tiny_export.mask("Q8_0"))


def test_noise_floor_separates_rounding_from_signal(
    tiny_export: SimpleNamespace, rows: Callable
) -> None:
    reports = {}
    for quant in ("F16", "Q4_0"):
        with Engine(tiny_export.model(quant), delta=tiny_export.mask(quant)) as engine:
            reports[quant] = measure_noise(engine, rows(engine))
    # int8 activations are far noisier than f16 ones, so eps must be larger.
    assert reports["Q4_0"].floor > 5 * reports["F16"].floor
    assert reports["Q4_0"].eps > reports["F16"].eps
    for report in reports.values():
        assert report.difference > 5 * report.floor
        assert report.error < 0.2


def test_attach_answers_like_the_engine(tiny_export: SimpleNamespace, rows: Callable) -> None:
    path = tiny_export.model("F16")
    mask = Mask.load(tiny_export.mask("F16"))
    theta = np.random.default_rng(0).normal(0, 0.2, mask.nnz).astype(np.float32)
    delta = Delta.from_mask(mask, theta, {"step": 1})
    with Engine(path, delta=delta) as engine:
        examples = rows(engine)
        tuned = engine.losses(examples)[0]
    llama = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False)
    plain = [stock_loss(llama, e) for e in examples]
    assert attach(llama, delta) is llama
    attached = [stock_loss(llama, e) for e in examples]
    np.testing.assert_allclose(attached, tuned, atol=5e-3)
    assert np.abs(np.array(plain) - tuned).max() > 0.05
    text = llama.create_completion("The", max_tokens=4, temperature=0)["choices"][0]["text"]
    assert isinstance(text, str)
    with pytest.raises(ZoError, match="check the path"):
        attach(llama, "none.safetensors")
    again = [stock_loss(llama, e) for e in examples]
    assert again == attached  # a mistake leaves what was there
    attach(llama, delta.with_theta(2 * theta, {}))
    assert np.abs(np.array([stock_loss(llama, e) for e in examples]) - again).max() > 0.05
    detach(llama)
    assert np.array_equal([stock_loss(llama, e) for e in examples], plain)
    llama.close()


def test_attached_models_raise_where_a_node_is_refused(tmp_path: Path) -> None:
    """llama_decode returns success then, and would give text of a model that was half computed."""
    path = write_llama(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(path), n_ctx=256, verbose=False)
    plain = llama.create_completion("The", max_tokens=4, temperature=0)
    delta = random_delta(GgufFile(path))
    attach(llama, delta)
    tuned = llama.create_completion("The", max_tokens=4, temperature=0)
    assert tuned["choices"] != plain["choices"]
    # From here on, one weight has another shape than the model has.
    store = llama._zo_gguf_attachment.parameters._store
    store.add("output.weight", (3, 5), np.array([2]), np.ones(1, np.float32))
    for _ in range(2):
        with pytest.raises(ZoError, match=r"output.weight has an unexpected shape or type"):
            llama.create_completion("The", max_tokens=4, temperature=0)
        with pytest.raises(ZoError, match=r"output.weight has an unexpected shape or type"):
            llama("The", max_tokens=4, temperature=0)
        with pytest.raises(ZoError, match=r"output.weight has an unexpected shape or type"):
            llama.eval([1])
    assert llama.n_tokens == 0
    attach(llama, delta)
    again = llama.create_completion("The", max_tokens=4, temperature=0)
    assert again["choices"] == tuned["choices"]
    llama.close()


def test_nothing_stays_of_a_decode_that_was_refused(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    row = Example([1, 100, 101, 102], [False, True, True, True])
    with Engine(path, delta=random_delta(GgufFile(path)), n_threads=1) as engine:
        engine.losses([row])
        assert engine._forward._context.is_clean
        engine.parameters._store.add("output.weight", (3, 5), np.array([2]), np.ones(1, np.float32))
        with pytest.raises(ZoError, match=r"output\.weight has an unexpected shape or type"):
            engine.losses([row])
        assert not engine._forward._context.is_clean  # so that the next decode erases the cache


def stock_loss(llama: llama_cpp.Llama, example: object) -> float:
    """Choice cross-entropy by plain llama-cpp-python, for one-token choices."""
    llama.reset()
    llama.eval(example.tokens[: example.n_prompt])
    logits = llama.scores[example.n_prompt - 1].astype(np.float64)
    scores = logits[[choice[0] for choice in example.choices]]
    return float(np.log(np.exp(scores).sum()) - scores[example.answer])


def test_a_file_that_llama_cpp_refuses_is_told_with_its_reason(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    data = path.read_bytes()
    assert data.count(b"llama.block_count") == 1
    path.write_bytes(data.replace(b"llama.block_count", b"llama.block_counT"))
    with pytest.raises(ZoError, match=r"cannot load .*: error loading model: .*block_count"):
        Engine(path, n_threads=1)


def test_encoders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "llama_model_has_encoder", lambda _: True)
    with pytest.raises(ZoError, match="has an encoder"):
        Engine(write_llama(tmp_path / "m.gguf"), n_threads=1)
