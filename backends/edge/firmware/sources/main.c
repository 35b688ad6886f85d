/* Runs the golden inputs, compares the output codes, and measures how many bytes of arena and stack a run touches.
 *
 * Every case runs twice, over memory painted with two patterns: a byte counts as touched where it differs from either,
 * and a result that depended on what was in the arena before would differ between the two. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../golden.h"
#include "port.h"

#define GUARD_BYTES 64u /* after the arena: nothing may touch them */
#define STACK_PATTERN 0xC5C5C5C5u
#define PAINT_MARGIN 64u /* bytes of stack that the painting itself may use */
#define STACK_OVERFLOW 1000

static uint8_t arena[MODEL_ARENA_BYTES + GUARD_BYTES] __attribute__((aligned(MODEL_ARENA_ALIGNMENT)));
static uint8_t results[MODEL_GOLDEN_RESULT_BYTES] __attribute__((aligned(16)));
static uint32_t *stack_painted_to;

/* Instructions are counted from the first one of model_run to the first one of this function. */
void model_run_ended(void);
__attribute__((noinline)) void model_run_ended(void) { __asm__ volatile("" ::: "memory"); }

static void print_number(const char *name, size_t value) {
    char text[24];
    size_t at = sizeof text - 1u;
    text[at] = '\0';
    text[--at] = '\n';
    do {
        text[--at] = (char)('0' + (char)(value % 10u));
        value /= 10u;
    } while (value != 0u);
    port_print(name);
    port_print(" ");
    port_print(&text[at]);
}

__attribute__((noinline)) static void paint_stack(uint32_t *bottom) {
    volatile uint32_t *word = bottom;
    stack_painted_to = (uint32_t *)__builtin_frame_address(0) - PAINT_MARGIN / sizeof(uint32_t);
    while (word < stack_painted_to) {
        *word++ = STACK_PATTERN;
    }
}

/* Bytes between the frame of the caller and the deepest word that was written since the stack was painted. */
__attribute__((noinline)) static size_t touched_stack(const uint32_t *bottom, const void *frame) {
    const volatile uint32_t *word = bottom;
    while (word < stack_painted_to && *word == STACK_PATTERN) {
        word++;
    }
    return (size_t)((const uint8_t *)frame - (const uint8_t *)word);
}

__attribute__((noinline)) static int32_t run_measured(const void *const *inputs, void *const *outputs, size_t *stack_bytes) {
    uint32_t *bottom = port_stack_bottom();
    size_t touched;
    int32_t status;
    paint_stack(bottom);
    status = model_run(inputs, outputs, arena);
    model_run_ended();
    touched = touched_stack(bottom, __builtin_frame_address(0));
    *stack_bytes = touched > *stack_bytes ? touched : *stack_bytes;
    return *bottom == STACK_PATTERN ? status : STACK_OVERFLOW;
}

static size_t touched_arena(uint8_t pattern) {
    size_t count = sizeof arena;
    while (count != 0u && arena[count - 1u] == pattern) {
        count--;
    }
    return count;
}

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
