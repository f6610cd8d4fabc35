/* QEMU user-mode plugin: counts the guest instructions of a run and prints "ICOUNT n" to stderr when it ends.
 *
 *   gcc -O2 -shared -fPIC -o libicount.so icount.c
 *   qemu-aarch64 -cpu cortex-a76 -plugin ./libicount.so PROGRAM ...
 *
 * The declarations are QEMU's own (include/qemu/qemu-plugin.h, API version 1), which Debian does not package.
 * An inline add is not atomic: count single-threaded runs only. */
#include <stdint.h>
#include <stdio.h>

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;

#define EXPORT __attribute__((visibility("default")))
enum { INLINE_ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int op, void *counter, uint64_t amount);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
unsigned long qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);

EXPORT int qemu_plugin_version = 1;

static uint64_t instructions;

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_inline(block, INLINE_ADD_U64, &instructions, qemu_plugin_tb_n_insns(block));
}

static void on_exit(qemu_plugin_id_t id, void *nothing) {
  (void)id, (void)nothing;
  fprintf(stderr, "ICOUNT %llu\n", (unsigned long long)instructions);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, on_exit, 0);
  return 0;
}
