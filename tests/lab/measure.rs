//! Placeholder.
use crate::{Result, With};
use clap::Args;
#[derive(Args)]
pub struct Measure {}
pub fn run(_: &With, _: &Measure) -> Result<bool> { Err("later".into()) }
