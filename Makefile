# Muster: what one types. `make help` lists it.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E)
TESTBED := $(SUDO) $(TARGET)/release/muster-testbed
# Tests that make network namespaces run as root; cargo itself does not.
AS_ROOT := $(if $(SUDO),CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(SUDO)")

# The patched QEMU, once `make qemu` has built it; MUSTER_QEMU= names another.
PATCHED_QEMU := $(abspath $(TARGET)/qemu/qemu-system-x86_64)
ifneq ($(wildcard $(PATCHED_QEMU)),)
export MUSTER_QEMU ?= $(PATCHED_QEMU)
endif
# The same without the patches, once `make qemu-base` has built it: `bench plain` compares with it.
BASE_QEMU := $(abspath $(TARGET)/qemu-base/qemu-system-x86_64)
ifneq ($(wildcard $(BASE_QEMU)),)
export MUSTER_BASE_QEMU ?= $(BASE_QEMU)
endif
STOCK_QEMU ?= qemu-system-x86_64
# Built once, for all tests. Of the whole workspace: for one package its features differ, and all is built again.
CHECKED := $(CARGO) test --locked --profile checked --workspace
REAL_QEMU_TESTS := $(AS_ROOT) $(CHECKED) --test faults --test real_qemu
# What takes long and is the same with both QEMUs, or needs none, runs with the patched one only; under TCG,
# where there is KVM, the stock one does not run at all: it may lose writes there (docs/failure-modes.md).
ON_ONE := $(addprefix --skip ,every_benchmark_runs users_of_an_application_feel traffic_is_counted \
	vms_that_do_not_fit_together comma_copies_everything a_link_that_carries_less lll_starts_the_largest \
	a_guest_that_boots_is_measured a_guest_that_writes_too_fast_to_its_disk \
	a_link_carries_its_rate a_link_can_be_cut three_hosts_reach a_user_without_root a_wan_has hosts_go_with \
	a_killed_testbed an_interrupted_testbed $(if $(wildcard /dev/kvm),tcg::))

.DEFAULT_GOAL := help
.PHONY: demo app app-image test test-patched lint bench faults build build-checked qemu qemu-check qemu-base setup clean help

demo: build ## three VMs move between two hosts: sequential, parallel, muster (ARGS=...)
	$(TESTBED) demo $(ARGS)

app: build app-image ## what users of web, app and db feel of a move over a WAN, per policy (ARGS=...)
	$(TESTBED) app $(ARGS)

app-image: ## kernel, nginx, redis and app server for the guests of `make app`, in target/app-image
	scripts/build-app-image.sh

test: setup lint build-checked qemu app-image ## everything: lints, unit tests, stock and patched QEMU, the protocol
	$(CHECKED) --lib --bins
	$(CHECKED) --exclude muster-testbed --test '*'
	$(CHECKED) --doc
	MUSTER_QEMU=$(STOCK_QEMU) $(REAL_QEMU_TESTS) -- $(ON_ONE)
	MUSTER_QEMU=$(PATCHED_QEMU) $(REAL_QEMU_TESTS)
	MUSTER_QEMU=$(STOCK_QEMU) MUSTER_SIDECAR=$(abspath $(TARGET))/checked/muster-sidecar $(SUDO) scripts/protocol-test.sh

test-patched: build-checked qemu app-image ## only the tests with real QEMU, on the patched one
	MUSTER_QEMU=$(PATCHED_QEMU) $(REAL_QEMU_TESTS)

build-checked: setup
	$(CARGO) build --locked --profile checked --workspace

lint: ## formatting, clippy and documentation, warnings as errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items

bench: build ## the measurements of docs/benchmarks.md (ARGS=...)
	$(TESTBED) bench $(ARGS)

faults: build ## the long form of the table of faults (ARGS=...)
	$(TESTBED) faults --long $(ARGS)

build: setup ## release build of all binaries
	$(CARGO) build --locked --release --workspace

qemu: ## the patched QEMU, in target/qemu (minutes at first, nothing when it is up to date)
	scripts/build-qemu.sh

qemu-check: ## QEMU's own test of migration and those of the series, on the patched QEMU (ARGS=kvm|tcg)
	scripts/check-qemu.sh $(ARGS)

qemu-base: ## the same QEMU without the patches, in target/qemu-base: what `bench plain` compares with
	scripts/build-qemu.sh base

setup: ## installs QEMU and tools where they are missing (Debian 12 and 13)
	scripts/setup.sh

clean: ## removes what was built
	$(CARGO) clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
