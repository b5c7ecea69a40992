// Nodes of the engine's graph: their columns, and where their bytes lie.

#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/columns.h"
#include "ggml-backend.h"
#include "ggml.h"

namespace zo {

constexpr std::string_view OUTPUT_NODE = "result_output";  // the logits

inline int64_t n_columns(const ggml_tensor * t) {
    return t->ne[1] * t->ne[2] * t->ne[3];
}

// The columns of a node, where its bytes start at `data`.
inline columns columns_at(char * data, const ggml_tensor * t) {
    return { data, t->ne[1], t->ne[2], t->nb[1], t->nb[2], t->nb[3] };
}

inline bool in_host_memory(const ggml_tensor * t) {
    ggml_backend_buffer * buffer = t->view_src != nullptr ? t->view_src->buffer : t->buffer;
    return buffer == nullptr || ggml_backend_buffer_is_host(buffer);
}

// A node's matrix in host memory: the tensor's own bytes, or a copy of them.
struct host_view {
    std::vector<char> copy;
    char *            data = nullptr;

    host_view(const ggml_tensor * t, bool staged) {
        if (staged) {
            copy.resize(ggml_nbytes(t));
            ggml_backend_tensor_get(t, copy.data(), 0, copy.size());
        }
        data = staged ? copy.data() : (char *) t->data;
    }
};

}  // namespace zo
