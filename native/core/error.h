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

// Fails unless an array of n values is there, and n is what the callee reads from it or writes to it.
inline zo_status check_array(const char * function, const void * array, int64_t n, int64_t wanted) {
    if (array == nullptr) {
        return fail(ZO_ARGUMENT, std::string(function) + " got a null pointer");
    }
    if (n != wanted) {
        return fail(ZO_ARGUMENT, std::string(function) + " got an array of " + std::to_string(n) +
                                     " values instead of " + std::to_string(wanted));
    }
    return ZO_OK;
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
