// Weights with something of ours on them, found by name at every node of the engine's graph.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace zo {

// Weight has a `name` and an `id`, its number in the order of adding.
template <typename Weight>
struct named_weights {
    std::vector<Weight>                        weights;
    std::map<std::string, size_t, std::less<>> by_name;

    const Weight * find(std::string_view name) const {
        const auto it = by_name.find(name);
        return it == by_name.end() ? nullptr : &weights[it->second];
    }
    // The name must be new.
    void append(Weight weight) {
        weight.id = (uint32_t) weights.size();
        by_name.emplace(weight.name, weights.size());
        weights.push_back(std::move(weight));
    }
};

}  // namespace zo
