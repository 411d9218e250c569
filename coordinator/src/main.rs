//! `muster`: moves a group of running VMs together, or not at all. See docs/muster.1.md.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
