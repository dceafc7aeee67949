/* What bertile-run prints of a model and of arrays: the lines of loader.py. */
#ifndef BERTILE_SHOW_H
#define BERTILE_SHOW_H

#include "internal.h"

/* `took` is the seconds that opening it took. */
void show_model(const bertile_model *model, const json *manifest, double took);
/* One line: `kind`, the name, the shape, and the first numbers if `values`. */
void show_tensor(const char *kind, const bertile_tensor *tensor, int values);
/* A line for each output; BERTILE_FAILED for one that is not finite. */
bertile_status show_outputs(const bertile_result *result);

#endif
