/* Continues a prompt, one token a call, always by the likeliest next token, and compares the tokens with those expected.
 *
 * The caches are inputs that each call also writes; they belong to one text. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../golden.h"
#include "port.h"

#define GUARD_BYTES 64u /* after the arena: nothing may touch them */
#define PATTERN 0xA5u
#define STACK_PATTERN 0xC5C5C5C5u
#define PAINT_MARGIN 64u /* bytes of stack that the painting itself may use */
#define FIRST_CACHE 2u   /* inputs: the token, how many came before it, caches */

static uint8_t arena[MODEL_ARENA_BYTES + GUARD_BYTES] __attribute__((aligned(MODEL_ARENA_ALIGNMENT)));
static uint8_t caches[MODEL_GOLDEN_CACHE_BYTES] __attribute__((aligned(16)));
static float logits[MODEL_OUTPUT_0_ELEMENTS];
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

__attribute__((noinline)) static size_t touched_stack(const uint32_t *bottom, const void *frame) {
    const volatile uint32_t *word = bottom;
    while (word < stack_painted_to && *word == STACK_PATTERN) {
        word++;
    }
    return (size_t)((const uint8_t *)frame - (const uint8_t *)word);
}

/* Returns the likeliest token after a token at a place of the text. */
__attribute__((noinline)) static size_t next_token(int64_t token, int64_t past, const void **inputs, size_t *stack_bytes) {
    uint32_t *bottom = port_stack_bottom();
    void *outputs[MODEL_OUTPUT_COUNT];
    size_t best = 0u, i, touched;
    inputs[0] = &token;
    inputs[1] = &past;
    outputs[0] = logits;
    paint_stack(bottom);
    (void)model_run(inputs, outputs, arena);
    model_run_ended();
    touched = touched_stack(bottom, __builtin_frame_address(0));
    *stack_bytes = touched > *stack_bytes ? touched : *stack_bytes;
    for (i = 1u; i < MODEL_OUTPUT_0_ELEMENTS; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

int main(void) {
    const void *inputs[MODEL_INPUT_COUNT];
    size_t at = 0u, equal = 0u, arena_bytes = sizeof arena, stack_bytes = 0u, which, token = 0u, step;
    int ok;
    for (which = FIRST_CACHE; which < MODEL_INPUT_COUNT; which++) {
        inputs[which] = &caches[at];
        at += (model_golden_input_bytes[which] + 15u) & ~(size_t)15u;
    }
    memset(arena, PATTERN, sizeof arena);
    if (model_init(arena, MODEL_ARENA_BYTES) != 0) {
        port_print("FAILED\n");
        return 1;
    }
    for (step = 0; step < MODEL_GOLDEN_PROMPT + MODEL_GOLDEN_TOKENS - 1u; step++) {
        const size_t given = step < MODEL_GOLDEN_PROMPT ? (size_t)model_golden_prompt[step] : token;
        token = next_token((int64_t)given, (int64_t)step, inputs, &stack_bytes);
        if (step + 1u >= MODEL_GOLDEN_PROMPT) {
            print_number("token", token);
            equal += token == (size_t)model_golden_tokens[step + 1u - MODEL_GOLDEN_PROMPT];
        }
    }
    while (arena_bytes != 0u && arena[arena_bytes - 1u] == PATTERN) {
        arena_bytes--;
    }
    print_number("cases", MODEL_GOLDEN_TOKENS);
    print_number("equal", equal);
    print_number("arena_high_water", arena_bytes);
    print_number("stack_high_water", stack_bytes);
    ok = equal == MODEL_GOLDEN_TOKENS && arena_bytes <= MODEL_ARENA_BYTES;
    port_print(ok ? "ok\n" : "FAILED\n");
    return ok ? 0 : 1;
}
