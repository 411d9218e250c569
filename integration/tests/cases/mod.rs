//! The cases, and what they share.

mod adapt;
mod app;
mod balloon;
mod benches;
mod comma;
mod commands;
mod direct;
mod dirty_log;
mod disk_faults;
mod disks;
mod groups;
mod guests;
mod measure;
mod moves;
mod network;
mod survey;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use testbed::guest::GuestSpec;
use testbed::process::Isolation;
use testbed::qemu::{Accel, Launch, Qemu, Role};
use testbed::ticks::Collector;

pub type GuestCase = fn(Accel) -> Result<()>;
pub type OtherCase = fn() -> Result<()>;

pub const GUEST_CASES: &[(&str, GuestCase)] = &[
    (
        "a_guest_ticks_and_dirties_as_asked",
        guests::ticks_and_dirties,
    ),
    ("every_page_verifies", guests::every_page_verifies),
    ("a_stale_page_is_found", guests::a_stale_page_is_found),
    (
        "a_plain_migration_is_measured_and_verified",
        moves::plain_migration,
    ),
    ("two_running_copies_are_noticed", moves::two_running_copies),
    (
        "a_group_moves_there_and_back_together",
        groups::there_and_back,
    ),
    ("local_disks_move_with_their_group", disks::there_and_back),
    ("every_policy_moves_every_vm", groups::every_policy),
    ("several_channels_carry_a_group", groups::several_channels),
    ("a_paused_vm_stays_paused", groups::paused_stays_paused),
    ("a_waiting_qemu_is_adopted", groups::adopted),
    ("a_stream_goes_direct_without_a_hold", direct::without_hold),
    ("a_patched_qemu_holds_a_direct_stream", direct::with_hold),
    ("the_dirtying_of_a_vm_is_measured", measure::figures),
    ("a_measurement_yields_to_a_move", measure::yields),
];

/// The same whoever executes the guest: under KVM where there is KVM.
pub const EITHER_CASES: &[(&str, GuestCase)] = &[
    (
        "a_source_keeps_its_disk_when_a_destination_dies",
        disks::taken_back,
    ),
    (
        "a_hung_destination_does_not_stop_a_guests_disk",
        disks::hung,
    ),
    ("every_kind_of_disk_moves", disks::every_kind),
    ("a_disk_whose_connection_is_cut_stays", disk_faults::cut),
    ("a_disk_that_finds_no_room_stays", disk_faults::full),
    (
        "an_image_in_use_at_the_destination_is_named",
        disk_faults::locked,
    ),
    ("a_direct_stream_keeps_its_pace", direct::paced),
];

/// Guests that dirty memory faster than it is sent. Under TCG QEMU's dirty tracking has a fault
/// there: when a synchronisation finds only pages dirty that wait to be sent already,
/// `cpu_physical_memory_sync_dirty_bitmap` (QEMU include/exec/ram_addr.h) does not reset the
/// vCPU's TLB, later writes to these pages go unnoticed, and the destination lacks them. KVM is
/// not concerned.
pub const KVM_CASES: &[(&str, GuestCase)] = &[
    (
        "a_group_that_cannot_converge_is_given_up_cleanly",
        groups::given_up,
    ),
    ("a_hot_group_is_throttled_until_it_fits", groups::throttled),
    (
        "vms_that_do_not_fit_together_move_in_groups",
        groups::one_after_another_where_two_do_not_fit,
    ),
    (
        "comma_copies_everything_once_and_then_moves_groups_in_turn",
        comma::two_stages,
    ),
    (
        "a_link_that_carries_less_than_was_told_is_found",
        adapt::a_narrow_link,
    ),
    (
        "lll_starts_the_largest_dirty_rate_last",
        groups::lll_by_dirty_rate,
    ),
    (
        "a_guest_that_writes_too_fast_to_its_disk_is_slowed",
        disks::slowed,
    ),
    (
        "a_hot_vm_is_ended_by_the_rule_that_was_chosen",
        groups::ended_by_rule,
    ),
    ("what_a_file_leaves_out_is_measured", survey::figures),
    ("a_guest_that_boots_is_measured_again", survey::booting),
    ("a_move_measures_before_it_begins", survey::before_a_move),
    ("every_benchmark_runs", benches::every_benchmark),
];

/// What only a QEMU with Muster's patches can do.
pub const PATCHED_CASES: &[(&str, GuestCase)] = &[
    (
        "a_hot_vm_is_held_after_its_first_round",
        groups::held_after_one_round,
    ),
    (
        "the_dirty_log_of_a_running_guest_is_exported",
        dirty_log::measuring,
    ),
    (
        "the_dirty_log_of_a_migration_is_exported",
        dirty_log::migrating,
    ),
];

/// The same, too costly to be run twice: under KVM only.
pub const PATCHED_KVM_CASES: &[(&str, GuestCase)] = &[
    (
        "no_write_is_lost_by_five_moves_and_five_that_are_taken_back",
        disk_faults::nothing_is_lost,
    ),
    (
        "what_a_guest_does_not_use_is_not_copied_and_comes_back",
        balloon::given_and_given_back,
    ),
];

pub const OTHER_CASES: &[(&str, OtherCase)] = &[
    ("an_accelerator_is_chosen_by_trying", guests::accelerator),
    ("a_link_carries_its_rate", network::link_rate),
    ("a_link_can_be_cut_and_restored", network::cut_and_restore),
    ("three_hosts_reach_each_other", network::three_hosts),
    ("a_user_without_root_has_hosts_and_links", network::rootless),
    ("a_wan_has_time_rate_and_loss", app::wan),
    ("hosts_go_with_their_processes", network::hosts_go),
    (
        "a_killed_testbed_is_cleaned_up_after",
        network::killed_testbed,
    ),
    (
        "an_interrupted_testbed_cleans_up",
        network::interrupted_testbed,
    ),
];

/// Cases with a group under TCG.
pub const COMMAND_CASES: &[(&str, OtherCase)] = &[
    ("check_names_every_problem_at_once", commands::check),
    ("run_reports_and_status_shows", commands::run_and_status),
    (
        "an_interrupt_before_the_decision_rolls_back",
        commands::interrupted,
    ),
    ("abort_from_outside_rolls_back", commands::aborted),
    ("a_measurement_leaves_nothing_behind", measure::misuse),
    ("users_of_an_application_feel_a_move", app::three_policies),
    ("traffic_is_counted_between_vms", app::traffic_matrix),
];

pub const LIMIT: Duration = Duration::from_secs(20);

/// A directory and a collector, on the machine itself.
pub struct Lab {
    pub directory: tempfile::TempDir,
    pub collector: Collector,
    pub accel: Accel,
}

impl Lab {
    pub fn new(accel: Accel) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("muster-").tempdir()?;
        let collector = Collector::start(directory.path())?;
        Ok(Self {
            directory,
            collector,
            accel,
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn start(&self, spec: &GuestSpec, host: &str, role: Role) -> Result<Qemu> {
        let ticks = self
            .collector
            .listen(&spec.name, host, spec.tick_period())?;
        let launch = Launch::new(spec, self.accel, self.directory.path(), host, ticks)?;
        let isolation = Isolation {
            netns: None,
            log: Some(self.path(&format!("{host}.log"))),
        };
        let qmp = self.path(&format!("{host}.qmp"));
        Ok(launch.start(role, &qmp, &isolation)?)
    }
}
