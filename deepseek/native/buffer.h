// Memory that grows and never shrinks, aligned to cache lines. What it holds is undefined after it has
// grown: every step writes what it reads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace intserve {

template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    T* data() const { return data_; }
    // Room for at least `size` values.
    void reserve(int64_t size) {
        if (size <= size_) return;
        std::free(data_);
        const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) {
            size_ = 0;
            throw std::bad_alloc();
        }
        size_ = size;
    }

private:
    T* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace intserve
