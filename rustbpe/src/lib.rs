//! Byte-level BPE: a parallel trainer and an encoder whose ids equal tiktoken's.
//!
//! By stage: [`split`] cuts text into pieces (`window` does so for ASCII), [`count`] counts them, [`stream`] does so on
//! all cores, [`train`] finds the merges, [`vocab`] holds what came of it, `merge` and [`encode`] turn text into ids,
//! [`batches`] does so on all cores. [`decode`] has nothing to do with them: it is the step of the model that decodes text
//! on a processor, here because this is the one extension that is compiled. `python` is the only part that knows Python.

pub mod batches;
mod classes;
pub mod count;
pub mod decode;
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
