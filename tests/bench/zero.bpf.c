// SPDX-License-Identifier: Apache-2.0
// Programs that do nothing: what is measured is attaching.
#define SECTION(name) __attribute__((section(name), used))

char LICENSE[] SECTION("license") = "Apache-2.0";

SECTION("kprobe.multi") int multi(void *context)
{
	return 0;
}

SECTION("kprobe") int single(void *context)
{
	return 0;
}
