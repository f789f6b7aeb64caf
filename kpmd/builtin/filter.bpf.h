/* SPDX-License-Identifier: GPL-2.0-only */
/* Whose calls are wanted: variables that every builtin has, set when it is loaded. What is not asked
 * for costs nothing: the verifier leaves it out. */
#pragma once
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

/* TASK_COMM_LEN of the kernel: a thread's name, its NUL included. */
#define COMMAND_LEN 16
/* How deep a cgroup may lie below the root to be found in `target_cgroup_tree`. */
#define CGROUP_LEVELS 32

/* 0: all processes; else this one alone (its id in the initial PID namespace). */
const volatile __u32 target_pid = 0;
/* -1: all users; else this one alone. */
const volatile __s64 target_uid = -1;
/* Empty: all; else threads of this name alone (padded with NULs). */
const volatile char target_command[COMMAND_LEN] = "";
/* 0: all; else what is in this very cgroup, by its id: the inode number of its folder. */
const volatile __u64 target_cgroup = 0;
#ifndef REGISTERS
/* 0: all; else what is in this cgroup or below it. Kernels before 5.15 cannot tell. */
const volatile __u64 target_cgroup_tree = 0;

static __always_inline bool below(__u64 cgroup)
{
	__u64 ancestor;
	int level;

	for (level = 0; level < CGROUP_LEVELS; level++) {
		ancestor = bpf_get_current_ancestor_cgroup_id(level);
		if (ancestor == cgroup)
			return true;
		if (!ancestor)
			return false;
	}
	return false;
}
#endif

static __always_inline bool is_named(const volatile char *wanted)
{
	char command[COMMAND_LEN];
	int i;

	if (bpf_get_current_comm(command, sizeof(command)))
		return false;
	/* Not all kernels fill up what is behind the name. */
#pragma unroll
	for (i = 0; i < COMMAND_LEN; i++) {
		if (command[i] != wanted[i])
			return false;
		if (!wanted[i])
			break;
	}
	return true;
}

/* Whether the running thread's calls are. */
static __always_inline bool wanted(void)
{
	if (target_pid && bpf_get_current_pid_tgid() >> 32 != target_pid)
		return false;
	if (target_uid >= 0 && (__u32)bpf_get_current_uid_gid() != target_uid)
		return false;
	if (target_cgroup && bpf_get_current_cgroup_id() != target_cgroup)
		return false;
#ifndef REGISTERS
	if (target_cgroup_tree && !below(target_cgroup_tree))
		return false;
#endif
	return !target_command[0] || is_named(target_command);
}
