/* What the example asks of the machine that it runs on: text out, two files, and the end of the stack. */
#ifndef PORT_H
#define PORT_H

#include <stddef.h>
#include <stdint.h>

typedef int32_t port_file; /* negative: it cannot be opened */

void port_print(const char *text);
port_file port_open(const char *name, int writing);
size_t port_read(port_file file, void *data, size_t bytes); /* the bytes that were read, fewer at the end of the file */
void port_write(port_file file, const void *data, size_t bytes);
uint32_t *port_stack_bottom(void); /* the lowest address that the stack may reach */

#endif
