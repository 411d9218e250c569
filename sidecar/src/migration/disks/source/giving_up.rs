//! A move that is given up: jobs and nodes are removed, and the guest writes to its disks as before.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Mirrors, Stage, Tag, job, target};

/// How often it is tried to remove what an abandoned mirror left.
const CLEAN: Duration = Duration::from_millis(50);
/// Until it is said that it cannot be removed.
const CLEAN_WITHIN: Duration = Duration::from_secs(5);

impl Mirrors {
    /// The move is given up, and the connections are cut: jobs and nodes go.
    pub fn abandon(&mut self, now: Instant) {
        match self.stage {
            Stage::Idle => self.stage = Stage::Gone,
            Stage::Gone | Stage::Leaving { .. } => {}
            stage => {
                self.stage = Stage::Leaving { since: Some(now) };
                self.problem = None;
                for index in 0..self.disks.len() {
                    // Jobs and nodes of those that were sealed are gone.
                    self.disks[index].removed |= stage == Stage::Sealed;
                    if !self.disks[index].removed {
                        let arguments = json!({ "device": job(index), "force": true });
                        self.ask(Tag::Cancel(index), "block-job-cancel", arguments);
                    }
                }
                self.release_guest();
                // Answers come in order: with this one's, all of that is done.
                self.ask(Tag::Leftover, "query-block-jobs", Value::Null);
                self.poll_at = None;
            }
        }
    }

    /// The monitor was connected anew: what was asked before is not answered any more.
    pub fn reconnected(&mut self, now: Instant) {
        self.polling = false;
        if matches!(self.stage, Stage::Leaving { .. }) {
            // Nor is it known whether limits of the guest's writes were taken off.
            self.is_adopted = true;
            self.release_guest();
            self.poll_at = Some(now);
        }
    }

    /// What was measured of the guest's writes, and how they were limited, ends.
    fn release_guest(&mut self) {
        self.untrack();
        self.throttle(0);
        if self.is_adopted {
            self.ask(Tag::Devices, "query-block", Value::Null);
        }
    }

    /// Given up: are the jobs gone, so that the nodes can go?
    pub(super) fn clean(&mut self, now: Instant, value: &Value) {
        if !matches!(self.stage, Stage::Leaving { .. }) {
            return;
        }
        let ours = |found: &&Value| {
            let device = found["device"].as_str().unwrap_or_default();
            (0..self.disks.len()).any(|index| job(index) == device)
        };
        if value.as_array().into_iter().flatten().any(|job| ours(&job)) {
            self.poll_at = Some(now + CLEAN);
            self.complain(now, "its mirror does not end");
            return;
        }
        for index in 0..self.disks.len() {
            if !self.disks[index].removed {
                let arguments = json!({ "node-name": target(index) });
                self.ask(Tag::Remove(index), "blockdev-del", arguments);
            }
        }
        self.look_removed();
    }

    /// QEMU does not say whether the jobs are gone.
    pub(super) fn ask_again(&mut self, now: Instant, error: &str) {
        self.poll_at = Some(now + CLEAN);
        self.complain(now, &format!("QEMU does not tell of its jobs: {error}"));
    }

    pub(super) fn removed(&mut self, index: usize) {
        self.disks[index].removed = true;
        self.look_removed();
    }

    fn look_removed(&mut self) {
        if self.disks.iter().all(|disk| disk.removed) {
            self.stage = Stage::Gone;
            self.poll_at = None;
        }
    }

    pub(super) fn remove_again(&mut self, now: Instant, index: usize, error: &str) {
        let node = target(index);
        self.poll_at = Some(now + CLEAN);
        self.complain(now, &format!("node `{node}` cannot be removed: {error}"));
    }

    /// Says once that something is still there; it is tried on.
    fn complain(&mut self, now: Instant, text: &str) {
        if let Stage::Leaving { since } = &mut self.stage {
            if since.is_some_and(|since| now >= since + CLEAN_WITHIN) {
                *since = None;
                self.problem = Some(format!("a disk's mirror was given up, but {text}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn questions(mirrors: &mut Mirrors) -> usize {
        let commands = mirrors.take_commands().into_iter();
        commands.filter(|ask| ask.tag == Tag::Leftover).count()
    }

    #[test]
    fn sealed_mirrors_are_gone_when_the_guest_is_released() {
        let now = Instant::now();
        let mut mirrors = Mirrors::adopt(&["root".to_owned()]);
        (mirrors.stage, mirrors.is_adopted) = (Stage::Sealed, false);
        mirrors.abandon(now);
        let asked = |mirrors: &mut Mirrors| -> Vec<&str> {
            let commands = mirrors.take_commands();
            commands.iter().map(|ask| ask.command).collect()
        };
        let remove = "block-dirty-bitmap-remove";
        assert_eq!(asked(&mut mirrors), [remove, remove, "query-block-jobs"]);
        assert!(!mirrors.are_gone());
        // The connection breaks: all of it is asked again, and whether a limit was left.
        mirrors.reconnected(now);
        mirrors.tick(now);
        let again = [remove, remove, "query-block", "query-block-jobs"];
        assert_eq!(asked(&mut mirrors), again);
        mirrors.replied(now, Tag::Leftover, &json!([]));
        assert!(mirrors.are_gone());
    }

    #[test]
    fn it_is_asked_until_qemu_says_that_the_jobs_are_gone() {
        let mut now = Instant::now();
        let mut mirrors = Mirrors::adopt(&["root".to_owned()]);
        mirrors.abandon(now);
        assert_eq!(questions(&mut mirrors), 1);
        for _ in 0..3 {
            mirrors.refused(now, Tag::Leftover, "busy");
            now += CLEAN;
            assert_eq!(mirrors.deadline(), Some(now));
            mirrors.tick(now);
            assert_eq!(questions(&mut mirrors), 1);
        }
        mirrors.refused(now + CLEAN_WITHIN, Tag::Leftover, "busy");
        let problem = mirrors.take_problem().expect("it is told");
        assert!(problem.contains("busy"), "{problem}");
        mirrors.replied(now, Tag::Leftover, &json!([]));
        let removals = mirrors.take_commands();
        assert_eq!(removals.len(), 1);
        mirrors.replied(now, Tag::Remove(0), &Value::Null);
        assert!(mirrors.are_gone());
    }
}
