// SPDX-License-Identifier: GPL-2.0-only
/* Tells of each call of the functions it is attached to: ring buffer `events`, of
 * `struct trace_event`. SESSION: one program, linked as a session; else two, as kprobe and as
 * kretprobe. */
#include "clock.bpf.h"
#include "filter.bpf.h"
#include "function.bpf.h"

#define ARGUMENTS 6

struct begun {
	__u64 function;
	__u64 time_ns;
	__u64 arguments[ARGUMENTS];
};
#include "calls.bpf.h"

/* Tell of each call when it is entered, and of no return. */
const volatile bool entry_only = false;

/* Calls that `events` had no room for: it is read too slowly, or too small (max_entries). */
__u64 dropped = 0;

enum trace_kind { CALL_ENTERED, CALL_RETURNED };

/* `arguments` are the registers that hold a function's first six; how many it has is not known.
 * `duration_ns` and `return_value` are 0 where the call has not returned. `command` is the thread's
 * name. */
struct trace_event {
	__u64 time_ns;
	__u64 duration_ns;
	address function;
	__u64 arguments[ARGUMENTS];
	__s64 return_value;
	__u32 pid;
	__u32 tid;
	__u32 uid;
	__u32 gid;
	__u32 cpu;
	enum trace_kind kind;
	char command[COMMAND_LEN];
};

/* Puts the type into the BTF, for who reads the records. */
struct trace_event *trace_event_unused = 0;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

static __always_inline void tell(const struct begun *begun, enum trace_kind kind,
				 __u64 duration_ns, __s64 return_value)
{
	struct trace_event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	__u64 thread, user;

	if (!event) {
		__sync_fetch_and_add(&dropped, 1);
		return;
	}
	thread = bpf_get_current_pid_tgid();
	user = bpf_get_current_uid_gid();
	event->time_ns = begun->time_ns;
	event->duration_ns = duration_ns;
	event->function = (address)begun->function;
	__builtin_memcpy(event->arguments, begun->arguments, sizeof(event->arguments));
	event->return_value = return_value;
	event->pid = thread >> 32;
	event->tid = thread;
	event->uid = user;
	event->gid = user >> 32;
	event->cpu = bpf_get_smp_processor_id();
	event->kind = kind;
	/* Not all kernels fill up what is behind the name. */
	__builtin_memset(event->command, 0, sizeof(event->command));
	bpf_get_current_comm(event->command, sizeof(event->command));
	bpf_ringbuf_submit(event, 0);
}

/* A call is entered; whether its return is wanted. */
static __always_inline bool enter(void *ctx)
{
	struct pt_regs *registers = registers(ctx);
	struct begun begun;

	if (!wanted())
		return false;
	begun.function = function_entered(ctx);
	begun.arguments[0] = PT_REGS_PARM1(registers);
	begun.arguments[1] = PT_REGS_PARM2(registers);
	begun.arguments[2] = PT_REGS_PARM3(registers);
	begun.arguments[3] = PT_REGS_PARM4(registers);
	begun.arguments[4] = PT_REGS_PARM5(registers);
	begun.arguments[5] = registers->r9; /* PT_REGS_PARM6 is not in every libbpf. */
	begun.time_ns = bpf_ktime_get_ns();
	if (entry_only) {
		tell(&begun, CALL_ENTERED, 0, 0);
		return false;
	}
	begin(ctx, &begun);
	return true;
}

static __always_inline void leave(void *ctx)
{
	struct begun begun;

	if (!entry_only && end(ctx, &begun))
		tell(&begun, CALL_RETURNED, since(begun.time_ns), PT_REGS_RC(registers(ctx)));
}

#ifdef SESSION
SEC("kprobe.session")
int trace(void *ctx)
{
	if (!bpf_session_is_return(ctx))
		return enter(ctx) ? 0 : 1; /* 1: not called at its return. */
	leave(ctx);
	return 0;
}
#else
SEC("kprobe.multi")
int trace_entry(void *ctx)
{
	enter(ctx);
	return 0;
}

SEC("kretprobe.multi")
int trace_return(void *ctx)
{
	leave(ctx);
	return 0;
}
#endif

char LICENSE[] SEC("license") = "GPL";
