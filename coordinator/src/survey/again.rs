//! VMs whose groups wait are measured again while others move: what was found before the move may be
//! minutes old when their turn comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use super::{Wanted, loads};
use crate::application::{Application, VmId, VmProfile};

/// Between the end of one measurement and the next.
const EVERY: Duration = Duration::from_secs(10);

/// Measures beside the move, one time after the other. A VM that is prepared meanwhile ends the
/// measurement of itself; dropping this ends the others.
#[derive(Debug)]
pub struct Again {
    /// With what the file says of these VMs, and nothing that was measured.
    app: Arc<Application>,
    vms: Vec<VmId>,
    under_way: Option<Receiver<Vec<(VmId, VmProfile)>>>,
    next_at: Duration,
    stop: Arc<AtomicU8>,
    measure: Measure,
}

/// What could be measured of these VMs, until it is to stop.
type Measure = fn(&Application, Vec<VmId>, &AtomicU8) -> Vec<(VmId, VmProfile)>;

impl Again {
    /// For the VMs that were measured before the move: what the file says of others stands. `file` is the
    /// application as the file has it, `now` as it is known now.
    #[must_use]
    pub fn new(file: &Application, now: &Application, wanted: &Wanted) -> Self {
        let mut app = now.clone();
        for &id in &wanted.vms {
            let known = &mut app.vms[id.0].profile;
            *known = VmProfile {
                disk: known.disk,
                ..file.vm(id).profile
            };
        }
        Self {
            app: Arc::new(app),
            vms: wanted.vms.clone(),
            under_way: None,
            next_at: EVERY,
            stop: Arc::default(),
            measure,
        }
    }

    /// What was found since the last call; begins to measure those that wait when it is time.
    pub fn look(&mut self, now: Duration, waiting: &[VmId]) -> Vec<(VmId, VmProfile)> {
        let found = match self.under_way.as_ref().map(Receiver::try_recv) {
            Some(Ok(found)) => found,
            Some(Err(TryRecvError::Empty)) => return Vec::new(),
            // A thread that failed has found nothing.
            Some(Err(TryRecvError::Disconnected)) | None => Vec::new(),
        };
        if self.under_way.take().is_some() {
            self.next_at = now + EVERY;
        }
        let mut vms = self.vms.clone();
        vms.retain(|vm| waiting.contains(vm));
        if now >= self.next_at && !vms.is_empty() {
            let (answer, receiver) = channel();
            let (app, stop) = (Arc::clone(&self.app), Arc::clone(&self.stop));
            let measure = self.measure;
            std::thread::spawn(move || {
                // Nobody may listen any more.
                let _ = answer.send(measure(&app, vms, &stop));
            });
            self.under_way = Some(receiver);
        }
        found
    }
}

impl Drop for Again {
    fn drop(&mut self) {
        self.stop.store(1, Ordering::Relaxed);
    }
}

/// What could be measured.
fn measure(app: &Application, vms: Vec<VmId>, stop: &AtomicU8) -> Vec<(VmId, VmProfile)> {
    let wanted = Wanted {
        bandwidth: false,
        vms,
        dirty_set: false,
        traffic: false,
    };
    let found = loads::measure(app, &wanted, stop).into_iter();
    let profiles = found.filter_map(|(id, load)| {
        let vm = app.vm(id);
        let mut profile = vm.profile;
        load.ok()?.fill(&vm.name, &mut profile, false);
        Some((id, profile))
    });
    profiles.collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rate_limiter::BytesPerSecond;

    use super::*;

    const FILE: &str = r#"
        version = 1
        application = { name = "shop", bandwidth = "50MB/s" }
        host = [{ name = "a", control = "unix:/a" }, { name = "b", control = "unix:/b" }]
        vm = [
          { name = "web", uuid = "00000000-0000-0000-0000-000000000001", from = "a", to = "b" },
          { name = "db", uuid = "00000000-0000-0000-0000-000000000002", from = "a", to = "b" },
        ]
    "#;

    /// Each is found to dirty 7 B/s, and to be known as the file has it.
    fn seven(app: &Application, vms: Vec<VmId>, _stop: &AtomicU8) -> Vec<(VmId, VmProfile)> {
        let found = vms.into_iter().map(|id| {
            let mut profile = app.vm(id).profile;
            assert_eq!(
                profile.dirty_rate, None,
                "measured before, and not the file's"
            );
            profile.dirty_rate = Some(BytesPerSecond(7));
            (id, profile)
        });
        found.collect()
    }

    fn wait(again: &mut Again, now: Duration, waiting: &[VmId]) -> Vec<(VmId, VmProfile)> {
        for _ in 0..5000 {
            let found = again.look(now, waiting);
            if !found.is_empty() || again.under_way.is_none() {
                return found;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("it does not end");
    }

    #[test]
    fn who_waits_and_was_measured_is_measured_again_every_ten_seconds() {
        let file = Application::parse(FILE, Path::new("test")).expect("good");
        let mut known = file.clone();
        known.vms[1].profile.dirty_rate = Some(BytesPerSecond(3));
        let wanted = Wanted {
            bandwidth: false,
            vms: vec![VmId(1)],
            dirty_set: false,
            traffic: false,
        };
        let mut again = Again::new(&file, &known, &wanted);
        again.measure = seven;
        let both = [VmId(0), VmId(1)];
        let second = Duration::from_secs(1);
        assert!(again.look(EVERY - second, &both).is_empty());
        assert!(again.under_way.is_none(), "it is not time");
        assert!(again.look(EVERY, &[VmId(0)]).is_empty());
        assert!(again.under_way.is_none(), "the file says what web does");
        assert!(again.look(EVERY, &both).is_empty());
        assert!(again.under_way.is_some());
        let found = wait(&mut again, EVERY + 5 * second, &both);
        let rates: Vec<_> = found.iter().map(|one| (one.0, one.1.dirty_rate)).collect();
        assert_eq!(rates, [(VmId(1), Some(BytesPerSecond(7)))]);
        assert!(again.look(2 * EVERY, &both).is_empty());
        assert!(again.under_way.is_none(), "ten seconds from its end");
        assert!(again.look(2 * EVERY + 5 * second, &both).is_empty());
        assert!(again.under_way.is_some());
        let stop = Arc::clone(&again.stop);
        drop(again);
        assert_eq!(stop.load(Ordering::Relaxed), 1);
    }
}
