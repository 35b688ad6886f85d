/* Reads one set of inputs after the other from the file inputs.bin, runs each, and appends the output codes to outputs.bin. */
#include <stddef.h>
#include <stdint.h>

#include "../golden.h"
#include "port.h"

static uint8_t arena[MODEL_ARENA_BYTES] __attribute__((aligned(MODEL_ARENA_ALIGNMENT)));
static uint8_t given[MODEL_GOLDEN_INPUT_BYTES] __attribute__((aligned(16)));
static uint8_t results[MODEL_GOLDEN_RESULT_BYTES] __attribute__((aligned(16)));

int main(void) {
    const void *inputs[MODEL_INPUT_COUNT];
    void *outputs[MODEL_OUTPUT_COUNT];
    port_file from = port_open("inputs.bin", 0);
    port_file to = port_open("outputs.bin", 1);
    size_t which, at = 0u;
    for (which = 0; which < MODEL_INPUT_COUNT; which++) {
        inputs[which] = &given[at];
        at += (model_golden_input_bytes[which] + 15u) & ~(size_t)15u;
    }
    at = 0u;
    for (which = 0; which < MODEL_OUTPUT_COUNT; which++) {
        outputs[which] = &results[at];
        at += (model_golden_output_bytes[which] + 15u) & ~(size_t)15u;
    }
    if (from < 0 || to < 0 || model_init(arena, sizeof arena) != 0) {
        return 1;
    }
    for (;;) {
        at = 0u;
        for (which = 0; which < MODEL_INPUT_COUNT; which++) {
            if (port_read(from, &given[at], model_golden_input_bytes[which]) != model_golden_input_bytes[which]) {
                return which == 0u ? 0 : 1;
            }
            at += (model_golden_input_bytes[which] + 15u) & ~(size_t)15u;
        }
        if (model_run(inputs, outputs, arena) != 0) {
            return 1;
        }
        for (which = 0; which < MODEL_OUTPUT_COUNT; which++) {
            port_write(to, outputs[which], model_golden_output_bytes[which]);
        }
    }
}
