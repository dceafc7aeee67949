// check_cpp BUNDLE: the C++ classes run a model, and throw on this side of the border.
#include <cstdio>
#include <cstring>

#include "bertile.hpp"

int main(int, char **words) {
    bertile::Model model(words[1], 1);
    bertile::Result result = model({{"input_ids", {1, 3}, {1, 2, 3}}});
    const bertile_tensor &pooled = result["pooled"];
    std::printf("%s", pooled.name);
    for (int i = 0; i < 8; i++) std::printf(" %.4f", static_cast<const float *>(pooled.data)[i]);
    std::printf("\n");
    try {
        model({{"input_ids", {1, 1}, {50}}});
    } catch (const bertile::Error &error) {
        std::printf("%d %s\n", error.code, error.what());
    }
    try {
        bertile::Model("/nothing");
    } catch (const bertile::Error &error) {
        std::printf("%d %s\n", error.code, error.what());
    }
    return std::strcmp(result.at(0).name, "hidden") != 0;
}
