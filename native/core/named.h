// Weights with something of ours on them, found by name at every node of the engine's graph.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ggml.h"

namespace zo {

// Tensors copied to a device are renamed "DEVICE#name#n"; gives back the name in the file.
inline std::string_view weight_name(const ggml_tensor * t) {
    std::string_view name(t->name);
    const size_t     first = name.find('#'), last = name.rfind('#');
    return first == last ? name : name.substr(first + 1, last - first - 1);
}

// Weight has a `name` and an `id`, its number in the order of adding.
template <typename Weight>
struct named_weights {
    std::vector<Weight>                        weights;
    std::map<std::string, size_t, std::less<>> by_name;

    const Weight * find(std::string_view name) const {
        const auto it = by_name.find(name);
        return it == by_name.end() ? nullptr : &weights[it->second];
    }
    bool has(int32_t number) const { return number >= 0 && (size_t) number < weights.size(); }
    // The name must be new.
    void append(Weight weight) {
        weight.id = (uint32_t) weights.size();
        by_name.emplace(weight.name, weights.size());
        weights.push_back(std::move(weight));
    }
};

}  // namespace zo
