//! The one error type of the crate. Bad input is a value, never a panic.

use std::fmt;

/// What can go wrong, in words meant for the person who passed the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The caller's arguments or data are not usable; the text says what and what was expected.
    Invalid(String),
    /// The caller's progress callback asked to stop.
    Interrupted,
}

impl Error {
    /// An [`Error::Invalid`] with this message.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(message) => f.write_str(message),
            Self::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Error {}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
