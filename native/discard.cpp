// A sampler of llama.cpp that samples nothing, inside the graph: the engine copies no logits of sequences
// that have one to the host.

#include "zo.h"

bool zo_discard_init(void *, void *, uint32_t) {
    return true;
}

void zo_discard_apply(void *, void *, void *, void * data) {
    // llama_sampler_data: logits, probabilities, sampled tokens and candidates that are to be copied.
    void ** wanted = (void **) data;
    for (int i = 0; i < 4; ++i) {
        wanted[i] = nullptr;
    }
}
