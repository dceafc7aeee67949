// The C interface as C++17 classes that clean up after themselves; nothing but bertile.h behind it.
#ifndef BERTILE_HPP
#define BERTILE_HPP

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bertile.h"

namespace bertile {

// What a call of the C interface reported, thrown on this side of the border.
class Error : public std::runtime_error {
public:
    explicit Error(bertile_status status) : std::runtime_error(bertile_error()), code(status) {}
    const bertile_status code;
};

// A named (batch, length) array of 64-bit integers.
struct Input {
    std::string name;
    std::array<std::int64_t, 2> shape;
    std::vector<std::int64_t> values;
};

// The outputs of one run; tensors live as long as it.
class Result {
public:
    explicit Result(bertile_result *result) : result_(result, bertile_free) {}

    const bertile_tensor &operator[](const char *name) const {
        const bertile_tensor *found = bertile_find(result_.get(), name);
        if (!found) throw std::out_of_range(std::string("no output has the name ") + name);
        return *found;
    }
    const bertile_tensor &at(std::size_t index) const {
        const bertile_tensor *found = bertile_output(result_.get(), index);
        if (!found) throw std::out_of_range("no output has that index");
        return *found;
    }

private:
    std::unique_ptr<bertile_result, void (*)(bertile_result *)> result_;
};

class Model {
public:
    explicit Model(const std::string &directory, int threads = 0) : model_(nullptr, bertile_close) {
        bertile_options options = {};
        options.size = sizeof options;
        options.threads = threads;
        bertile_model *made = nullptr;
        check(bertile_open(directory.c_str(), &options, &made));
        model_.reset(made);
    }

    Result operator()(const std::vector<Input> &inputs) const {
        std::vector<bertile_tensor> tensors;
        for (const Input &input : inputs) {
            if (static_cast<std::int64_t>(input.values.size()) != input.shape[0] * input.shape[1])
                throw std::invalid_argument(input.name + " does not have the values of its shape");
            tensors.push_back({input.name.c_str(), BERTILE_INT64, 2, input.shape.data(),
                               input.values.data()});
        }
        bertile_result *result = nullptr;
        check(bertile_run(model_.get(), tensors.data(), tensors.size(), &result));
        return Result(result);
    }

    void set_threads(int threads) { check(bertile_set_threads(model_.get(), threads)); }
    bertile_model *get() const { return model_.get(); }

private:
    static void check(bertile_status status) {
        if (status != BERTILE_OK) throw Error(status);
    }
    std::unique_ptr<bertile_model, void (*)(bertile_model *)> model_;
};

}  // namespace bertile
#endif
