/* RISC-V of 32 bits: start-up, and the system calls of Linux as QEMU's user mode answers them, without a C library for it. */
#include "port.h"

enum { SYS_OPENAT = 56, SYS_READ = 63, SYS_WRITE = 64, SYS_EXIT = 93, AT_FDCWD = -100, WRITE_CREATE_TRUNCATE = 01101 };
#define STACK_BYTES 65536u /* of the 8 MB that the process has, as much as is painted */

int main(void);
void start(void);

static long system_call(long number, long a, long b, long c, long d) {
    register long a0 __asm__("a0") = a;
    register long a1 __asm__("a1") = b;
    register long a2 __asm__("a2") = c;
    register long a3 __asm__("a3") = d;
    register long a7 __asm__("a7") = number;
    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a3), "r"(a7) : "memory");
    return a0;
}

__attribute__((used, noinline)) static void run_main(void) {
    (void)system_call(SYS_EXIT, main(), 0, 0, 0);
    for (;;) {
    }
}

__attribute__((naked, used)) void start(void) {
    __asm__ volatile(
        ".option push\n\t.option norelax\n\tla gp, __global_pointer$\n\t.option pop\n\tandi sp, sp, -16\n\tj %0" ::"i"(run_main));
}

void port_print(const char *text) {
    size_t length = 0u;
    while (text[length] != '\0') {
        length++;
    }
    port_write(1, text, length);
}

port_file port_open(const char *name, int writing) {
    return (port_file)system_call(SYS_OPENAT, AT_FDCWD, (long)name, writing != 0 ? WRITE_CREATE_TRUNCATE : 0, 0644);
}

size_t port_read(port_file file, void *data, size_t bytes) {
    size_t done = 0u;
    while (done < bytes) {
        long count = system_call(SYS_READ, file, (long)data + (long)done, (long)(bytes - done), 0);
        if (count <= 0) {
            break;
        }
        done += (size_t)count;
    }
    return done;
}

void port_write(port_file file, const void *data, size_t bytes) {
    (void)system_call(SYS_WRITE, file, (long)data, (long)bytes, 0);
}

uint32_t *port_stack_bottom(void) { return (uint32_t *)__builtin_frame_address(0) - STACK_BYTES / sizeof(uint32_t); }
