//! Texts from Python: a `str`, or a column of Arrow, and the iterators that yield them.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyIterator, PyList, PyString};

use super::Stop;

/// Text handed over at once, so that one batch keeps a thread busy for some milliseconds.
const BATCH_BYTES: usize = 1 << 20;

/// The UTF-8 bytes of a text, alive and readable without the GIL.
///
/// Python would keep the UTF-8 form of a `str` that is not ASCII beside it for as long as it lives; on a list of all
/// texts of a corpus that is half of its size again. So such a text is encoded into bytes of its own.
pub enum Text {
    Ascii(PyBackedStr),
    Encoded(String),
    /// A row of a column.
    Row {
        rows: Arc<str>,
        start: usize,
        end: usize,
    },
}

impl AsRef<str> for Text {
    fn as_ref(&self) -> &str {
        match self {
            Self::Ascii(text) => text,
            Self::Encoded(text) => text,
            // `Column::next_rows` has looked at both ends.
            Self::Row { rows, start, end } => rows.get(*start..*end).unwrap_or_default(),
        }
    }
}

pub fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}

/// Whether every character of a `str` is ASCII. Asked of `str` itself: a subclass may say what it likes.
fn is_ascii(text: &Bound<'_, PyString>) -> PyResult<bool> {
    static IS_ASCII: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = text.py();
    let is_ascii =
        IS_ASCII.get_or_try_init(py, || Ok::<_, PyErr>(py.get_type::<PyString>().getattr("isascii")?.unbind()))?;
    is_ascii.call1(py, (text,))?.is_truthy(py)
}

/// The text of a Python `str`. `name` says in errors which one it was.
pub fn text_of(object: &Bound<'_, PyAny>, name: impl Fn() -> String) -> PyResult<Text> {
    let text = object
        .cast::<PyString>()
        .map_err(|_| PyTypeError::new_err(format!("{}: expected str, got {}", name(), type_name(object))))?;
    if is_ascii(text)? {
        return Ok(Text::Ascii(PyBackedStr::try_from(text.clone())?));
    }
    let bytes = text.encode_utf8().map_err(|error| {
        PyValueError::new_err(format!("{}: not valid Unicode: {}", name(), error.value(object.py())))
    })?;
    // Checked and copied once: whoever reads it afterwards does so often.
    let text = std::str::from_utf8(bytes.as_bytes())
        .map_err(|error| PyValueError::new_err(format!("{}: not valid Unicode: {error}", name())))?;
    Ok(Text::Encoded(text.to_owned()))
}

/// A Python iterator of texts and columns, read a batch at a time.
pub struct Source {
    iterator: Py<PyIterator>,
    buffer_size: usize,
    columns: Vec<Column>,
    /// Texts read so far.
    pub texts: usize,
    /// Their bytes.
    pub bytes: usize,
}

impl Source {
    pub fn new(iterable: &Bound<'_, PyAny>, buffer_size: usize) -> PyResult<Self> {
        let iterator = iterable.try_iter()?.unbind();
        Ok(Self { iterator, buffer_size, columns: Vec::new(), texts: 0, bytes: 0 })
    }

    /// The next texts, up to a mebibyte or `buffer_size` of them; `None` at the end.
    pub fn next_batch(&mut self, py: Python<'_>) -> Result<Option<Vec<Text>>, Stop> {
        let mut iterator = self.iterator.bind(py).clone();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < self.buffer_size && bytes < BATCH_BYTES {
            if let Some(column) = self.columns.last_mut() {
                let read = batch.len();
                column.next_rows(py, self.buffer_size - read, BATCH_BYTES - bytes, &mut batch)?;
                bytes += batch[read..].iter().map(|text| text.as_ref().len()).sum::<usize>();
                self.columns.pop_if(|column| column.is_done());
                continue;
            }
            let Some(item) = iterator.next() else { break };
            let (item, at) = (item?, self.texts + batch.len());
            if item.is_instance_of::<PyString>() {
                let text = text_of(&item, || format!("text {at} of the iterator"))?;
                bytes += text.as_ref().len();
                batch.push(text);
            } else {
                self.columns = columns_of(&item, at)?;
                self.columns.reverse();
            }
        }
        self.texts += batch.len();
        self.bytes += bytes;
        Ok((!batch.is_empty()).then_some(batch))
    }
}

/// A string array of Arrow: the bytes of all rows end to end, and where each begins and the last one ends.
struct Column {
    rows: Py<PyAny>,
    offsets: Vec<usize>,
    next: usize,
}

/// The arrays of an item that is no `str`: one, or the chunks of a `ChunkedArray`; without nulls and empty arrays.
fn columns_of(item: &Bound<'_, PyAny>, at: usize) -> PyResult<Vec<Column>> {
    let py = item.py();
    let wrong = |what: String| {
        PyTypeError::new_err(format!(
            "text {at} of the iterator: expected str or an Arrow array of strings, got {what}"
        ))
    };
    if let Ok(chunks) = item.getattr(intern!(py, "chunks")) {
        let chunks = chunks.cast_into::<PyList>().map_err(|_| wrong(type_name(item)))?;
        let each = chunks.iter().map(|chunk| columns_of(&chunk, at)).collect::<PyResult<Vec<_>>>()?;
        return Ok(each.into_iter().flatten().collect());
    }
    if !item.hasattr(intern!(py, "buffers"))? {
        return Err(wrong(type_name(item)));
    }
    let kind = item.getattr(intern!(py, "type"))?.str()?.to_string();
    let width = match kind.as_str() {
        "string" => 4,
        "large_string" => 8,
        _ => return Err(wrong(format!("{} of {kind}", type_name(item)))),
    };
    let item = &item.call_method0(intern!(py, "drop_null"))?;
    let (len, first) = (item.len()?, item.getattr(intern!(py, "offset"))?.extract::<usize>()?);
    let buffers = item.call_method0(intern!(py, "buffers"))?;
    let (offsets, rows) = (buffers.get_item(1)?, buffers.get_item(2)?);
    if len == 0 || rows.is_none() {
        // No row, or only empty ones.
        return Ok(Vec::new());
    }
    let offsets = bytes_of(&offsets, first * width, (len + 1) * width)?;
    let offsets = offsets.chunks_exact(width).map(|entry| {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(entry);
        u64::from_le_bytes(bytes) as usize
    });
    Ok(vec![Column { rows: rows.unbind(), offsets: offsets.collect(), next: 0 }])
}

/// A copy of a part of an Arrow buffer: its own memory cannot be kept in safe Rust, and copying costs little beside
/// counting.
fn bytes_of(buffer: &Bound<'_, PyAny>, start: usize, len: usize) -> PyResult<PyBackedBytes> {
    let part = buffer.call_method1(intern!(buffer.py(), "slice"), (start, len))?;
    let bytes = part.call_method0(intern!(buffer.py(), "to_pybytes"))?.cast_into::<PyBytes>()?;
    Ok(PyBackedBytes::from(bytes))
}

impl Column {
    fn is_done(&self) -> bool {
        self.next + 1 >= self.offsets.len()
    }

    /// Appends the next rows: at most `most`, and no more than about `bytes` bytes, but one at least.
    fn next_rows(&mut self, py: Python<'_>, most: usize, bytes: usize, batch: &mut Vec<Text>) -> PyResult<()> {
        let damaged = || PyValueError::new_err("an Arrow array of the iterator has offsets that do not fit its text");
        let offsets = &self.offsets[self.next..];
        let start = offsets[0];
        let fitting = offsets[1..].iter().take(most).take_while(|&&end| end.saturating_sub(start) <= bytes).count();
        let rows = fitting.max(1);
        let len = offsets[rows].checked_sub(start).ok_or_else(damaged)?;
        let copy = bytes_of(self.rows.bind(py), start, len)?;
        let text: Arc<str> = std::str::from_utf8(&copy)
            .map_err(|error| PyValueError::new_err(format!("an Arrow array of the iterator is not UTF-8: {error}")))?
            .into();
        for ends in offsets[..=rows].windows(2) {
            let (Some(start), Some(end)) = (ends[0].checked_sub(start), ends[1].checked_sub(start)) else {
                return Err(damaged());
            };
            if text.get(start..end).is_none() {
                return Err(damaged());
            }
            batch.push(Text::Row { rows: Arc::clone(&text), start, end });
        }
        self.next += rows;
        Ok(())
    }
}
