/* Cortex-M without an operating system: vectors, start-up, and semihosting (the debugger or QEMU prints and opens files).
 *
 * "Semihosting for AArch32 and AArch64", Arm: the operation in r0, its argument in r1, answer in r0; on M profiles by bkpt 0xAB. */
#include <string.h>

#include "port.h"

enum { SYS_OPEN = 0x01, SYS_WRITE0 = 0x04, SYS_WRITE = 0x05, SYS_READ = 0x06, SYS_EXIT = 0x18 };
enum { STOPPED_BY_ERROR = 0x20023, STOPPED_AT_THE_END = 0x20026, OPEN_READ_BINARY = 1, OPEN_WRITE_BINARY = 5 };

extern uint32_t stack_bottom[], stack_top[], data_start[], data_end[], zero_start[], zero_end[];
extern const uint32_t data_load[];

int main(void);
void reset(void);

static intptr_t semihost(intptr_t operation, intptr_t argument) {
    register intptr_t r0 __asm__("r0") = operation;
    register intptr_t r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void stop(int code) {
    (void)semihost(SYS_EXIT, code == 0 ? STOPPED_AT_THE_END : STOPPED_BY_ERROR);
    for (;;) {
    }
}

static void fault(void) {
    port_print("fault\n");
    stop(1);
}

/* Initial stack pointer, reset, NMI, hard fault, and the faults that the larger cores tell apart. */
__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))stack_top, reset, fault, fault, fault, fault, fault, fault,
};

static int run_main(void) {
    const uint32_t *from = data_load;
    uint32_t *to;
    for (to = data_start; to < data_end; to++) {
        *to = *from++;
    }
    for (to = zero_start; to < zero_end; to++) {
        *to = 0u;
    }
    return main();
}

void reset(void) {
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* CPACR: full access to the coprocessors of floats and vectors */
    __asm__ volatile("dsb\n\tisb" ::: "memory");
#endif
    stop(run_main());
}

void port_print(const char *text) { (void)semihost(SYS_WRITE0, (intptr_t)text); }

port_file port_open(const char *name, int writing) {
    const intptr_t block[3] = {(intptr_t)name, writing != 0 ? OPEN_WRITE_BINARY : OPEN_READ_BINARY, (intptr_t)strlen(name)};
    return (port_file)semihost(SYS_OPEN, (intptr_t)block);
}

size_t port_read(port_file file, void *data, size_t bytes) {
    const intptr_t block[3] = {file, (intptr_t)data, (intptr_t)bytes};
    return bytes - (size_t)semihost(SYS_READ, (intptr_t)block); /* the answer is what was not read */
}

void port_write(port_file file, const void *data, size_t bytes) {
    const intptr_t block[3] = {file, (intptr_t)data, (intptr_t)bytes};
    (void)semihost(SYS_WRITE, (intptr_t)block);
}

uint32_t *port_stack_bottom(void) { return stack_bottom; }
