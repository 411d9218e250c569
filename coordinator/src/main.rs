//! `muster`: the command over the coordinator library.

fn main() {}
