// The module kernels._native: what each file of this folder binds, and the instruction sets that this
// processor runs.

#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

void bind_attention(nb::module_& m);
void bind_layer(nb::module_& m);
void bind_packed_attention(nb::module_& m);
void bind_products(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_sparse(nb::module_& m);

NB_MODULE(_native, m) {
    m.doc() = "Compiled CPU kernels; kernels.compiled says which of them this processor runs.";
    nb::list names;
    for (const char* name : kInstructionSets)
        if (runs(name)) names.append(name);
    // The list is empty where this processor runs none of them.
    m.attr("instructions") = nb::tuple(names);
    m.attr("multiplies_pairs") = runs_pairs();
    bind_attention(m);
    bind_layer(m);
    bind_packed_attention(m);
    bind_products(m);
    bind_rows(m);
    bind_sparse(m);
}
