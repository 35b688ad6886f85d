/* A processor with an operating system and its C library. */
#include <stdio.h>

#include "port.h"

#define STACK_BYTES 262144u /* of the megabytes that the process has, as much as is painted */

static FILE *files[2];

void port_print(const char *text) { (void)fputs(text, stdout); }

port_file port_open(const char *name, int writing) {
    port_file file = writing != 0 ? 1 : 0;
    files[file] = fopen(name, writing != 0 ? "wb" : "rb");
    return files[file] != NULL ? file : -1;
}

size_t port_read(port_file file, void *data, size_t bytes) { return fread(data, 1u, bytes, files[file]); }

void port_write(port_file file, const void *data, size_t bytes) { (void)fwrite(data, 1u, bytes, files[file]); }

uint32_t *port_stack_bottom(void) { return (uint32_t *)__builtin_frame_address(0) - STACK_BYTES / sizeof(uint32_t); }
