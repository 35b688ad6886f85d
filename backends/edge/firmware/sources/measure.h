/* What the examples measure with: an arena and a stack that are painted before a run and looked at after it. */
#ifndef MEASURE_H
#define MEASURE_H

#include <stddef.h>
#include <stdint.h>

#include "../model.h"
#include "port.h"

#define GUARD_BYTES 64u /* after the arena: nothing may touch them */
#define STACK_PATTERN 0xC5C5C5C5u
#define PAINT_MARGIN 64u /* bytes of stack that the painting itself may use */
#define STACK_OVERFLOW 1000

static uint8_t arena[MODEL_ARENA_BYTES + GUARD_BYTES] __attribute__((aligned(MODEL_ARENA_ALIGNMENT)));
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

#endif
