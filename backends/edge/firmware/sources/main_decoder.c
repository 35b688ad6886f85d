/* Continues a prompt, one token a call, always by the likeliest next token, and compares the tokens with those expected.
 *
 * The caches are inputs that each call also writes; they belong to one text. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../golden.h"
#include "measure.h"

#define PATTERN 0xA5u
#define FIRST_CACHE 2u /* inputs: the token, how many came before it, caches */

static uint8_t caches[MODEL_GOLDEN_CACHE_BYTES] __attribute__((aligned(16)));
static float logits[MODEL_OUTPUT_0_ELEMENTS];

/* Returns the likeliest token after a token at a place of the text. */
__attribute__((noinline)) static size_t next_token(int64_t token, int64_t past, const void **inputs, size_t *stack_bytes) {
    void *outputs[MODEL_OUTPUT_COUNT];
    size_t best = 0u, i;
    inputs[0] = &token;
    inputs[1] = &past;
    outputs[0] = logits;
    (void)run_measured(inputs, outputs, stack_bytes);
    for (i = 1u; i < MODEL_OUTPUT_0_ELEMENTS; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

int main(void) {
    const void *inputs[MODEL_INPUT_COUNT];
    size_t at = 0u, equal = 0u, arena_bytes, stack_bytes = 0u, which, token = 0u, step;
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
    arena_bytes = touched_arena(PATTERN);
    print_number("cases", MODEL_GOLDEN_TOKENS);
    print_number("equal", equal);
    print_number("arena_high_water", arena_bytes);
    print_number("stack_high_water", stack_bytes);
    ok = equal == MODEL_GOLDEN_TOKENS && arena_bytes <= MODEL_ARENA_BYTES;
    port_print(ok ? "ok\n" : "FAILED\n");
    return ok ? 0 : 1;
}
