//! CPU time of processes and threads, and the memory of processes, as the kernel counts them.

use std::io;

/// CPU time that was used, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CpuTime {
    /// In user mode.
    pub user_s: f64,
    /// In the kernel.
    pub system_s: f64,
}

impl CpuTime {
    /// Of a process with all its threads, so far.
    ///
    /// # Errors
    /// It is gone.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        parse(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?)
    }

    /// Of a process without the threads in `except`, so far. Threads that have ended do not count.
    ///
    /// # Errors
    /// It is gone.
    pub fn of_threads(pid: u32, except: &[u32]) -> io::Result<Self> {
        let mut sum = Self::default();
        for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let entry = entry?;
            let name = entry.file_name();
            let thread = name.to_str().and_then(|name| name.parse().ok());
            if thread.is_some_and(|thread: u32| except.contains(&thread)) {
                continue;
            }
            // A thread may end between the listing and the reading.
            if let Ok(text) = std::fs::read_to_string(entry.path().join("stat")) {
                sum = sum.plus(parse(&text)?);
            }
        }
        Ok(sum)
    }

    /// Both modes.
    #[must_use]
    pub fn total_s(self) -> f64 {
        self.user_s + self.system_s
    }

    /// The sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            user_s: self.user_s + other.user_s,
            system_s: self.system_s + other.system_s,
        }
    }

    /// What was used since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            user_s: (self.user_s - earlier.user_s).max(0.0),
            system_s: (self.system_s - earlier.system_s).max(0.0),
        }
    }
}

/// Reads a line of /proc/PID/stat. Fields are counted behind the name, which may hold anything.
fn parse(text: &str) -> io::Result<CpuTime> {
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields);
    let field = |index| {
        let field: Option<&str> = fields.split_whitespace().nth(index);
        field.and_then(|field| field.parse::<f64>().ok())
    };
    let (Some(user), Some(system)) = (field(11), field(12)) else {
        return Err(io::Error::other("/proc/PID/stat has too few fields"));
    };
    let hertz = ticks_per_second();
    Ok(CpuTime {
        user_s: user / hertz,
        system_s: system / hertz,
    })
}

fn ticks_per_second() -> f64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    let ticks = ticks.ok().flatten().and_then(|n| u32::try_from(n).ok());
    ticks.map_or(100.0, f64::from)
}

/// The most memory that a process has ever held (VmHWM), and what it holds now (VmRSS), in KiB.
///
/// # Errors
/// It is gone.
pub fn memory_kib(pid: u32) -> io::Result<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        number.ok_or_else(|| io::Error::other(format!("/proc/PID/status has no {key}")))
    };
    Ok((value("VmHWM:")?, value("VmRSS:")?))
}

/// Lets the process's VmHWM begin anew.
///
/// # Errors
/// It is gone, or the kernel does not let us.
pub fn forget_peak(pid: u32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_spaces_is_passed_over() {
        let line = "7 (a) b (c) S 1 7 7 0 -1 4194304 90 0 0 0 250 50 0 0 20 0 1 0 5 6 7";
        let time = parse(line).unwrap();
        assert!((time.total_s() * ticks_per_second() - 300.0).abs() < 1e-6);
        assert!(parse("7 (x) S 1").is_err());
    }

    #[test]
    fn our_own_numbers_can_be_read() {
        let own = std::process::id();
        let (peak, now) = memory_kib(own).unwrap();
        assert!(peak >= now && now > 0);
        let all = CpuTime::of_process(own).unwrap();
        assert!(CpuTime::of_threads(own, &[]).unwrap().total_s() <= all.total_s() + 1.0);
    }
}
