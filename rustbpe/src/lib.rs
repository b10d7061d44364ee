//! Byte-level BPE: a parallel trainer and an encoder whose ids equal tiktoken's.
//!
//! By stage: [`split`] cuts text into pieces (`window` does so for ASCII), [`count`] counts them, [`stream`] does so on
//! all cores, [`train`] finds the merges, [`vocab`] holds what came of it, `merge` and [`encode`] turn text into ids,
//! [`batches`] does so on all cores. `python` is the only file that knows Python.

pub mod batches;
mod classes;
pub mod count;
pub mod encode;
pub mod error;
mod key;
mod merge;
mod pairs;
pub mod split;
pub mod stream;
pub mod train;
pub mod vocab;
mod window;

#[cfg(feature = "python")]
mod python;
