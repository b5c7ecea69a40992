// Tensors found by name in the engine's graph and rewritten whole between decodes, on any backend.

#include <cstring>
#include <string>
#include <string_view>

#include "core/error.h"
#include "core/named.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "zo.h"

namespace zo {

struct named_tensor {
    std::string   name;
    int64_t       n_bytes = 0;
    uint32_t      id      = 0;
    ggml_tensor * tensor  = nullptr;
    bool          copied  = false;  // the graph reads a copy on a device, which another decode renews
};

}  // namespace zo

struct zo_tensors : zo::named_weights<zo::named_tensor> {};

namespace {

// llama.cpp marks a model's tensors as weights, but not an adapter's, whose products may then be computed
// elsewhere, on copies made for every decode. Marked, they stay with their memory from the next graph on;
// all of an adapter's tensors in one kind of memory share a buffer, so one that is found pins the others.
void keep_in_place(const ggml_tensor * tensor) {
    if (tensor->buffer != nullptr && ggml_backend_buffer_is_host(tensor->buffer)) {
        ggml_backend_buffer_set_usage(tensor->buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
}

}  // namespace

using zo::fail;
using zo::guarded;

zo_status zo_tensors_init(zo_tensors ** tensors) {
    return guarded([&] {
        if (tensors == nullptr) {
            return fail(ZO_ARGUMENT, "zo_tensors_init got a null pointer");
        }
        *tensors = new zo_tensors;
        return ZO_OK;
    });
}

void zo_tensors_free(zo_tensors * tensors) {
    delete tensors;
}

zo_status zo_tensors_add(zo_tensors * tensors, const char * name, int64_t n_bytes) {
    return guarded([&] {
        if (tensors == nullptr || name == nullptr || n_bytes < 1 || tensors->find(name) != nullptr) {
            return fail(ZO_ARGUMENT, "zo_tensors_add got a null pointer, no bytes or a name it knows");
        }
        tensors->append({ name, n_bytes, 0, nullptr, false });
        return ZO_OK;
    });
}

bool zo_tensors_eval(ggml_tensor * node, bool ask, void * user_data) {
    zo_tensors * tensors = (zo_tensors *) user_data;
    for (int i = 0; ask && i < GGML_MAX_SRC; ++i) {
        ggml_tensor * source = node->src[i];
        if (source == nullptr) {
            continue;
        }
        const std::string_view   name   = zo::weight_name(source);
        const bool               copied = name != source->name;
        const zo::named_tensor * found  = tensors->find(name);
        if (found == nullptr) {
            continue;
        }
        zo::named_tensor & named = tensors->weights[found->id];
        if (!copied) {
            keep_in_place(source);
        }
        if (!copied || named.tensor == nullptr) {
            named.tensor = source;
            named.copied = copied;
        }
    }
    return !ask;
}

int32_t zo_tensors_missing(const zo_tensors * tensors) {
    if (tensors == nullptr) {
        return -1;
    }
    int32_t missing = 0;
    for (const zo::named_tensor & named : tensors->weights) {
        missing += named.tensor == nullptr || named.copied;
    }
    return missing;
}

zo_status zo_tensors_set(const zo_tensors * tensors, int32_t number, const void * data, int64_t n_bytes) {
    return guarded([&] {
        if (tensors == nullptr || data == nullptr || !tensors->has(number)) {
            return fail(ZO_ARGUMENT, "zo_tensors_set got a null pointer or a number it does not know");
        }
        const zo::named_tensor & named = tensors->weights[(size_t) number];
        if (named.tensor == nullptr) {
            return fail(ZO_GRAPH, "the engine never read " + named.name);
        }
        if (named.copied) {
            return fail(ZO_GRAPH, "the engine copies " + named.name + " to a device for every decode");
        }
        if (n_bytes != named.n_bytes || (int64_t) ggml_nbytes(named.tensor) != n_bytes) {
            return fail(ZO_GRAPH, named.name + " has an unexpected size in memory");
        }
        ggml_backend_tensor_set(named.tensor, data, 0, (size_t) n_bytes);
        return ZO_OK;
    });
}
