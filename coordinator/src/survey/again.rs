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
}

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
