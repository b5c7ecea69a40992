// Failures as status codes with a text, kept per thread for zo_last_error.

#pragma once

#include <exception>
#include <new>
#include <string>

#include "zo.h"

namespace zo {

std::string & last_error();

inline zo_status fail(zo_status status, std::string text) {
    last_error() = std::move(text);
    return status;
}

// Runs the body of an API function; nothing may throw into C.
template <typename Body>
zo_status guarded(Body body) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return fail(ZO_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return fail(ZO_ARGUMENT, e.what());
    }
}

}  // namespace zo
