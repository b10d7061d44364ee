//! The Python module: arguments in, arrays and lists out. Everything slow runs with the GIL released.

mod texts;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use numpy::{IntoPyArray, PyArray1, PyArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};

use self::texts::{Source, Text, text_of, type_name};
use crate::encode::Encoder;
use crate::error::Error;
use crate::split::{GPT4_PATTERN, Splitter};
use crate::stream::{Limits, count_stream};
use crate::train::train;
use crate::vocab::{NO_ID, Vocab, show};

/// How often a long computation looks for Ctrl-C and reports its progress.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The least bound on memory, in bytes: below it the tables of an empty training would not fit.
const MIN_MEMORY: i64 = 64 << 20;

/// Bytes of text that a thread encodes at a time, when there are several.
const UNIT_BYTES: usize = 1 << 17;

/// What `PyLong_AsUnsignedLong` returns beside an exception; no id is so large.
const WRONG: std::ffi::c_ulong = std::ffi::c_ulong::MAX;

/// Texts below this many bytes are encoded without releasing the GIL, which costs more than it gives there.
const DETACH_MIN_BYTES: usize = 1 << 12;

/// What stops a call: an error of ours, or a Python exception on its way.
enum Stop {
    Ours(Error),
    Python(PyErr),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Ours(error)
    }
}

impl From<PyErr> for Stop {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl From<Stop> for PyErr {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Ours(error) => PyValueError::new_err(error.to_string()),
            Stop::Python(error) => error,
        }
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Stop::Ours(error).into()
    }
}

/// Ids of all texts end to end, and offsets with one more entry than texts.
type FlatArrays<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>);

/// Byte-level BPE tokenizer. See `rustbpe.pyi` for the documentation of each method.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    encoder: RwLock<Arc<Encoder>>,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Self::build(Vocab::from_merges(&[])?, GPT4_PATTERN)
    }

    #[staticmethod]
    fn from_ranks(ranks: &Bound<'_, PyAny>, pattern: &str) -> PyResult<Self> {
        let tokens = tokens_by_rank(ranks)?;
        let splitter = Splitter::new(pattern)?;
        let vocab = ranks.py().detach(|| Vocab::from_tokens(&tokens))?;
        Ok(Self::wrap(Encoder::new(vocab, splitter)))
    }

    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, num_threads=None, max_memory=None,
        progress=None))]
    #[allow(clippy::too_many_arguments)]
    fn train_from_iterator<'py>(
        &self,
        iterator: &Bound<'py, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        num_threads: Option<i64>,
        max_memory: Option<i64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let merges = merge_count(vocab_size)?;
        let limits = Limits { threads: thread_count(num_threads)?, max_memory: memory_bound(max_memory)? };
        let splitter = Splitter::new(pattern.unwrap_or(GPT4_PATTERN))?;
        let mut source = Source::new(iterator, positive("buffer_size", buffer_size)?)?;
        let pieces = AtomicU64::new(0);
        let mut watch = Watch { progress, last: Instant::now(), raised: None, bytes: 0, pieces: &pieces };
        let (vocab, distinct, pruned) = iterator.py().detach(|| -> Result<_, Stop> {
            let (counter, pruned) = count_stream(&splitter, limits, &pieces, || {
                Python::attach(|py| {
                    watch.bytes = source.bytes;
                    watch.look(py, 0)?;
                    source.next_batch(py)
                })
            })?;
            let (distinct, words) = (counter.len(), counter.into_words());
            let found = train(words, merges, |done| watch.check(done));
            watch.raised.take().map_or(Ok(()), Err)?;
            let found = found?;
            watch.last = Instant::now().checked_sub(LOOK_EVERY).unwrap_or(watch.last);
            Python::attach(|py| watch.look(py, found.len()))?;
            Ok((Vocab::from_merges(&found)?, distinct, pruned))
        })?;
        *self.encoder.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Encoder::new(vocab, splitter));
        let report = PyDict::new(iterator.py());
        report.set_item("texts", source.texts)?;
        report.set_item("bytes", source.bytes)?;
        report.set_item("pieces", pieces.into_inner())?;
        report.set_item("distinct_pieces", distinct)?;
        report.set_item("prunings", pruned.times)?;
        report.set_item("pruned_pieces", pruned.pieces)?;
        report.set_item("pruned_occurrences", pruned.occurrences)?;
        Ok(report)
    }

    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        self.ids_of(py, text)
    }

    fn encode_numpy<'py>(&self, py: Python<'py>, text: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<u32>>> {
        Ok(self.ids_of(py, text)?.into_pyarray(py))
    }

    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode(&self, texts: &Bound<'_, PyAny>, num_threads: Option<i64>) -> PyResult<Vec<Vec<u32>>> {
        let (ids, offsets) = self.flat(texts, num_threads)?;
        Ok(offsets.windows(2).map(|w| ids[w[0]..w[1]].to_vec()).collect())
    }

    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_batch_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<i64>,
    ) -> PyResult<FlatArrays<'py>> {
        let (ids, offsets) = self.flat(texts, num_threads)?;
        let offsets: Vec<i64> = offsets.into_iter().map(|offset| offset as i64).collect();
        Ok((ids.into_pyarray(py), offsets.into_pyarray(py)))
    }

    fn decode<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
        let bytes = self.bytes_of(ids)?;
        PyString::from_bytes(py, &bytes)
            .or_else(|_| PyString::from_encoded_object(&PyBytes::new(py, &bytes), Some(c"utf-8"), Some(c"replace")))
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.bytes_of(ids)?))
    }

    fn split(&self, text: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
        let text = text_of(text, || "text".to_owned())?;
        let text = text.as_ref();
        let mut pieces = Vec::new();
        self.encoder().splitter().for_each(text, |_, start, end| pieces.push(text[start..end].to_owned()))?;
        Ok(pieces)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder().vocab().len()
    }

    fn get_pattern(&self) -> String {
        self.encoder().splitter().pattern().to_owned()
    }

    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let encoder = self.encoder();
        (0..encoder.vocab().len() as u32).map(|id| (PyBytes::new(py, encoder.vocab().token(id)), id)).collect()
    }

    fn get_merges(&self) -> PyResult<Vec<(u32, u32)>> {
        let encoder = self.encoder();
        let vocab = encoder.vocab();
        (0..vocab.len() as u32)
            .filter(|&id| vocab.token(id).len() > 1)
            .map(|id| match vocab.parts(id) {
                (u32::MAX, _) => Err(PyValueError::new_err(format!(
                    "token {id}, {}, is not made by any merge of lower ranks: these ranks are no list of merges",
                    show(vocab.token(id))
                ))),
                parts => Ok(parts),
            })
            .collect()
    }
}

impl Tokenizer {
    fn build(vocab: Vocab, pattern: &str) -> PyResult<Self> {
        Ok(Self::wrap(Encoder::new(vocab, Splitter::new(pattern)?)))
    }

    fn wrap(encoder: Encoder) -> Self {
        Self { encoder: RwLock::new(Arc::new(encoder)) }
    }

    /// The present encoder; a training that ends meanwhile does not disturb who holds this one.
    fn encoder(&self) -> Arc<Encoder> {
        Arc::clone(&self.encoder.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn ids_of(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let text = text_of(text, || "text".to_owned())?;
        let text = text.as_ref();
        let encoder = self.encoder();
        let ids = if text.len() < DETACH_MIN_BYTES { encoder.encode(text) } else { py.detach(|| encoder.encode(text)) };
        Ok(ids?)
    }

    /// Ids of all texts end to end, and where each begins; texts are read while those before them are encoded.
    fn flat(&self, texts: &Bound<'_, PyAny>, num_threads: Option<i64>) -> PyResult<(Vec<u32>, Vec<usize>)> {
        let (py, threads) = (texts.py(), thread_count(num_threads)?);
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts: expected a list of str, got one str"));
        }
        let encoder = self.encoder();
        let mut texts = texts.try_iter()?.enumerate();
        let mut next_text = || -> PyResult<Option<Text>> {
            texts.next().map(|(i, text)| text_of(&text?, || format!("texts[{i}]"))).transpose()
        };
        if threads == 1 {
            let mut all = Vec::new();
            while let Some(text) = next_text()? {
                all.push(text);
            }
            return Ok(py.detach(|| encoder.encode_batch(&all, 1))?);
        }
        let next_batch = || -> Result<Option<Vec<Text>>, Stop> {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while bytes < UNIT_BYTES {
                let Some(text) = next_text()? else { break };
                bytes += text.as_ref().len();
                batch.push(text);
            }
            Ok((!batch.is_empty()).then_some(batch))
        };
        Ok(encoder.encode_stream(threads, next_batch, |work| py.detach(work))?)
    }

    fn bytes_of(&self, ids: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let encoder = self.encoder();
        let vocab = encoder.vocab();
        if let Ok(list) = ids.cast::<PyList>() {
            if let Ok(bytes) = vocab.decode(numbers_of(list)) {
                return Ok(bytes);
            }
        } else if let Ok(array) = ids.cast::<PyArray1<u32>>() {
            let array = array.readonly();
            return Ok(match array.as_slice() {
                Ok(ids) => vocab.decode(ids.iter().copied())?,
                Err(_) => vocab.decode(array.as_array().to_vec().into_iter())?,
            });
        }
        let mut list = Vec::with_capacity(ids.len().unwrap_or(0));
        for id in ids.try_iter()? {
            let id = id?;
            list.push(id.extract::<u32>().map_err(|_| not_an_id(&id, vocab.len()))?);
        }
        Ok(vocab.decode(list.into_iter())?)
    }
}

/// The numbers of a list, [`NO_ID`] for whatever is none, which the caller then looks for. Safe calls take 20 ns
/// an item through the stable ABI and `array.array` takes 7; these two take 5, and overlap with the look-up of the token.
#[allow(unsafe_code)]
fn numbers_of(list: &Bound<'_, PyList>) -> impl ExactSizeIterator<Item = u32> {
    (0..list.len()).map(|i| {
        // SAFETY: `list` is a list and we hold the GIL, which neither call lets go of: PyList_GetItem checks the index
        // and lends a reference that the list owns; PyLong_AsUnsignedLong runs no Python code, since it takes
        // instances of int only, so the list cannot change while the reference is in use. Null is not passed on. Both
        // report failures as an exception, which is taken back here.
        unsafe {
            let item = ffi::PyList_GetItem(list.as_ptr(), i as ffi::Py_ssize_t);
            let number = if item.is_null() { WRONG } else { ffi::PyLong_AsUnsignedLong(item) };
            if number == WRONG {
                ffi::PyErr_Clear();
            }
            u32::try_from(number).unwrap_or(NO_ID)
        }
    })
}

/// The exception for something that is no id: a wrong type, or a number no vocabulary has.
fn not_an_id(id: &Bound<'_, PyAny>, vocab_size: usize) -> PyErr {
    if id.extract::<i128>().is_ok() {
        PyValueError::new_err(format!("token id {id} is outside the vocabulary of {vocab_size} ids"))
    } else {
        PyTypeError::new_err(format!("token ids must be int, got {}", type_name(id)))
    }
}

fn positive(name: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value)
        .ok()
        .filter(|&value| value > 0)
        .ok_or_else(|| PyValueError::new_err(format!("{name}={value}: it must be 1 or more")))
}

fn thread_count(num_threads: Option<i64>) -> PyResult<usize> {
    match num_threads {
        Some(value) => positive("num_threads", value).map(|threads| threads.min(1024)),
        None => Ok(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
    }
}

fn merge_count(vocab_size: i64) -> PyResult<usize> {
    let merges = usize::try_from(vocab_size).ok().and_then(|size| size.checked_sub(256));
    merges.filter(|_| vocab_size < i64::from(u32::MAX)).ok_or_else(|| {
        PyValueError::new_err(format!(
            "vocab_size={vocab_size}: it must be 256 or more (the single bytes), and less than 2**32"
        ))
    })
}

fn memory_bound(max_memory: Option<i64>) -> PyResult<Option<u64>> {
    match max_memory {
        Some(bytes) if bytes < MIN_MEMORY => {
            Err(PyValueError::new_err(format!("max_memory={bytes}: it must be {MIN_MEMORY} bytes (64 MiB) or more")))
        }
        bytes => Ok(bytes.map(i64::unsigned_abs)),
    }
}

/// Tokens in order of rank from a dict or an iterable of (bytes, rank).
fn tokens_by_rank(ranks: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<u8>>> {
    let items = match ranks.cast::<PyDict>() {
        Ok(dict) => dict.items().into_any(),
        Err(_) => ranks.clone(),
    };
    let mut pairs = Vec::with_capacity(items.len().unwrap_or(0));
    for item in items.try_iter()? {
        let item = item?;
        let (token, rank): (Vec<u8>, i64) = item.extract().map_err(|_| {
            PyTypeError::new_err(format!("ranks: expected a dict of bytes to int or pairs of them, got {item:?}"))
        })?;
        pairs.push((rank, token));
    }
    pairs.sort_by_key(|&(rank, _)| rank);
    for ((rank, token), expected) in pairs.iter().zip(0i64..) {
        if *rank != expected {
            let what = if *rank < expected { "is there twice or negative" } else { "leaves a gap" };
            return Err(PyValueError::new_err(format!(
                "ranks: rank {rank} of {} {what}; expected each of 0..{} once",
                show(token),
                pairs.len()
            )));
        }
    }
    Ok(pairs.into_iter().map(|(_, token)| token).collect())
}

/// Looks for Ctrl-C now and then from inside a computation that has released the GIL, and reports progress.
struct Watch<'a> {
    /// `progress(bytes read, pieces counted, merges done)`, if there is one.
    progress: Option<Py<PyAny>>,
    last: Instant,
    raised: Option<Stop>,
    bytes: usize,
    pieces: &'a AtomicU64,
}

impl Watch<'_> {
    fn look(&mut self, py: Python<'_>, merges: usize) -> Result<(), Stop> {
        py.check_signals()?;
        if self.last.elapsed() >= LOOK_EVERY {
            self.last = Instant::now();
            if let Some(progress) = &self.progress {
                progress.call1(py, (self.bytes, self.pieces.load(Ordering::Relaxed), merges))?;
            }
        }
        Ok(())
    }

    fn check(&mut self, merges: usize) -> Result<(), Error> {
        if self.last.elapsed() < LOOK_EVERY {
            return Ok(());
        }
        Python::attach(|py| self.look(py, merges)).map_err(|stop| {
            self.raised = Some(stop);
            Error::Interrupted
        })
    }
}

/// Byte-level BPE: a parallel trainer and an encoder whose ids equal tiktoken's.
#[pymodule]
#[pyo3(name = "rustbpe")]
mod module {
    #[pymodule_export]
    use super::Tokenizer;
}
