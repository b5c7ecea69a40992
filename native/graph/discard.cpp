// A sampler of llama.cpp that samples nothing, inside the graph: the engine copies no logits of sequences
// that have one to the host.

#include <type_traits>

#include "llama.h"
#include "zo.h"

static_assert(std::is_same_v<decltype(llama_sampler_i::backend_init), decltype(&zo_discard_init)> &&
                  std::is_same_v<decltype(llama_sampler_i::backend_apply), decltype(&zo_discard_apply)>,
              "zo.h must declare these as llama.h wants them");

bool zo_discard_init(llama_sampler *, ggml_backend_buffer_type *, uint32_t) {
    return true;
}

void zo_discard_apply(llama_sampler *, ggml_context *, ggml_cgraph *, llama_sampler_data * data) {
    // What is set here would be copied to the host.
    data->logits     = nullptr;
    data->probs      = nullptr;
    data->sampled    = nullptr;
    data->candidates = nullptr;
}
