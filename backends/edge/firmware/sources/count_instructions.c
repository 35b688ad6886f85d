/* A plugin of QEMU that counts instructions from one address to the first arrival at another, by block of straight-line code.
 *
 * Arguments: start=HEX, stop=HEX, out=FILE. FILE gets a line "ADDRESS INSTRUCTIONS EXECUTIONS" for every block that ran between
 * them, the first time that they were passed. Each call and each return ends a block, so both addresses begin one where they are
 * the first instructions of functions. The interface (version 1, QEMU 4.2 and later: docs/devel/tcg-plugins.rst) is declared here
 * because distributions do not package its header. */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
enum { QEMU_PLUGIN_INLINE_ADD_U64 = 0, QEMU_PLUGIN_CB_NO_REGS = 0 };

extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, void (*call)(unsigned int, void *), int flags, void *data);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *tb, int operation, void *pointer, uint64_t immediate);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;
__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int count, char **arguments);

struct block {
    uint64_t address, instructions, executions;
    struct block *next;
};

static struct block *blocks;
static uint64_t start, stop;
static const char *out;

/* Runs before the block's own executions are counted. */
static void begin(unsigned int cpu, void *data) {
    (void)cpu;
    (void)data;
    for (struct block *block = blocks; block != NULL && out != NULL; block = block->next) {
        block->executions = 0;
    }
}

static void end(unsigned int cpu, void *data) {
    (void)cpu;
    (void)data;
    FILE *file = out != NULL ? fopen(out, "w") : NULL;
    for (struct block *block = blocks; block != NULL && file != NULL; block = block->next) {
        if (block->executions != 0) {
            fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions, block->executions);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    out = NULL;
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    struct block *block = calloc(1, sizeof *block);
    if (block == NULL) {
        abort();
    }
    block->address = qemu_plugin_tb_vaddr(tb);
    block->instructions = qemu_plugin_tb_n_insns(tb);
    block->next = blocks;
    blocks = block;
    if (block->address == start || block->address == stop) {
        qemu_plugin_register_vcpu_tb_exec_cb(tb, block->address == start ? begin : end, QEMU_PLUGIN_CB_NO_REGS, NULL);
    }
    qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &block->executions, 1);
}

int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int count, char **arguments) {
    (void)info;
    for (int i = 0; i < count; i++) {
        if (strncmp(arguments[i], "start=", 6) == 0) {
            start = strtoull(arguments[i] + 6, NULL, 16);
        } else if (strncmp(arguments[i], "stop=", 5) == 0) {
            stop = strtoull(arguments[i] + 5, NULL, 16);
        } else if (strncmp(arguments[i], "out=", 4) == 0) {
            out = arguments[i] + 4;
        }
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    return 0;
}
