/* Runs the golden inputs, compares the output codes, and measures how many bytes of arena and stack a run touches.
 *
 * Every case runs twice, over memory painted with two patterns: a byte counts as touched where it differs from either,
 * and a result that depended on what was in the arena before would differ between the two. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../golden.h"
#include "measure.h"

static uint8_t results[MODEL_GOLDEN_RESULT_BYTES] __attribute__((aligned(16)));

/* Returns 1 where all codes of a case are those expected, else prints the first that is not. */
static int codes_are_equal(size_t number, void *const *outputs) {
    size_t which;
    for (which = 0; which < MODEL_OUTPUT_COUNT; which++) {
        const uint8_t *expected = model_golden_outputs[number][which];
        const uint8_t *found = outputs[which];
        size_t byte;
        for (byte = 0; byte < model_golden_output_bytes[which]; byte++) {
            if (found[byte] != expected[byte]) {
                print_number("mismatch_case", number);
                print_number("mismatch_output", which);
                print_number("mismatch_byte", byte);
                return 0;
            }
        }
    }
    return 1;
}

int main(void) {
    static const uint8_t patterns[2] = {0xA5u, 0x5Au};
    size_t equal = 0u, arena_bytes = 0u, stack_bytes = 0u, number;
    for (number = 0; number < MODEL_GOLDEN_COUNT; number++) {
        int same = 1;
        size_t turn;
        for (turn = 0; turn < 2u; turn++) {
            void *outputs[MODEL_OUTPUT_COUNT];
            size_t which, at = 0u, touched;
            int32_t status;
            for (which = 0; which < MODEL_OUTPUT_COUNT; which++) {
                outputs[which] = &results[at];
                at += (model_golden_output_bytes[which] + 15u) & ~(size_t)15u;
            }
            memset(results, patterns[turn], sizeof results);
            memset(arena, patterns[turn], sizeof arena);
            status = model_init(arena, MODEL_ARENA_BYTES);
            if (status == 0) {
                status = run_measured(model_golden_inputs[number], outputs, &stack_bytes);
            }
            if (status != 0) {
                print_number("failed_case", number);
                print_number("status", (size_t)status);
                same = 0;
                break;
            }
            touched = touched_arena(patterns[turn]);
            arena_bytes = touched > arena_bytes ? touched : arena_bytes;
            if (!codes_are_equal(number, outputs)) {
                same = 0;
                break;
            }
        }
        equal += (size_t)same;
    }
    print_number("cases", MODEL_GOLDEN_COUNT);
    print_number("equal", equal);
    print_number("arena_high_water", arena_bytes);
    print_number("stack_high_water", stack_bytes);
    port_print(equal == MODEL_GOLDEN_COUNT && arena_bytes <= MODEL_ARENA_BYTES ? "ok\n" : "FAILED\n");
    return equal == MODEL_GOLDEN_COUNT && arena_bytes <= MODEL_ARENA_BYTES ? 0 : 1;
}
