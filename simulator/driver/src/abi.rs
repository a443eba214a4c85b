//! The border to C: result codes, pointers that a caller may set to null, and the net under every call.

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;

/// `CUresult`.
pub type CUresult = u32;

macro_rules! codes {
    ($($name:ident = $code:literal),* $(,)?) => {
        $(#[doc = concat!("`CUDA_ERROR_", stringify!($name), "`.")] pub const $name: CUresult = $code;)*
    };
}
codes! {
    INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209, UNSUPPORTED_LIMIT = 215, INVALID_PTX = 218, FILE_NOT_FOUND = 301, INVALID_HANDLE = 400,
    NOT_FOUND = 500, NOT_READY = 600, LAUNCH_OUT_OF_RESOURCES = 701, HOST_MEMORY_ALREADY_REGISTERED = 712, HOST_MEMORY_NOT_REGISTERED = 713,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720, NOT_SUPPORTED = 801, STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901, STREAM_CAPTURE_MERGE = 902, STREAM_CAPTURE_UNMATCHED = 903,
    STREAM_CAPTURE_UNJOINED = 904, STREAM_CAPTURE_ISOLATION = 905, STREAM_CAPTURE_IMPLICIT = 906, CAPTURED_EVENT = 907,
    STREAM_CAPTURE_WRONG_THREAD = 908, UNKNOWN = 999,
}

/// Why a call failed: its code, and a sentence for standard error (empty: the code says enough).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The call's result.
    pub code: CUresult,
    /// What was wrong with what.
    pub text: String,
}

/// How a call ended.
pub type Outcome<T = ()> = Result<T, Failure>;

/// A failure that is explained on standard error.
pub fn failure(code: CUresult, text: impl Into<String>) -> Failure {
    Failure { code, text: text.into() }
}

/// A failure that is only a code: one that was explained before, or one that programs meet in normal use.
pub fn quiet(code: CUresult) -> Failure {
    failure(code, "")
}

impl From<cuda_sim::MemoryError> for Failure {
    fn from(e: cuda_sim::MemoryError) -> Failure {
        failure(e.cuda_error(), e.to_string())
    }
}

/// Runs the body of a driver call. A panic must not cross into C: it becomes `CUDA_ERROR_UNKNOWN`.
pub fn call(name: &str, body: impl FnOnce() -> Outcome) -> CUresult {
    /// Programs that try machine code first do so for every module: once is enough.
    static SAID_NO_BINARY: AtomicBool = AtomicBool::new(false);
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => 0,
        Ok(Err(f)) => {
            if !f.text.is_empty() {
                let text = format!("{name}: {} (error {})", f.text, f.code);
                match f.code {
                    NO_BINARY_FOR_GPU => crate::report::say_once(&SAID_NO_BINARY, &text),
                    _ => crate::report::say(&text),
                }
            }
            f.code
        }
        Err(_) => {
            crate::report::say(&format!("{name}: the simulator itself failed; please report this"));
            UNKNOWN
        }
    }
}

/// Defines exported driver calls: `fn cuName(arguments) { body }`, where the body ends in an [`Outcome`].
macro_rules! driver_calls {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        #[doc = concat!("The driver call `", stringify!($name), "`.")]
        $(#[$meta])*
        // SAFETY: the symbol is the driver's, which this library stands in for.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, clippy::too_many_arguments)]
        pub extern "C" fn $name($($arg: $ty),*) -> $crate::abi::CUresult {
            $crate::abi::call(stringify!($name), || $body)
        }
    )*};
}
pub(crate) use driver_calls;

/// A pointer to write one result through. Only callers of the driver make one (Rust code cannot), and the driver's
/// manual makes them promise: null, or room for a `T`.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Writes the result; null is `CUDA_ERROR_INVALID_VALUE`.
    pub fn set(&self, value: T) -> Outcome {
        if self.0.is_null() {
            return Err(failure(INVALID_VALUE, "the pointer for the result is null"));
        }
        self.set_if_asked(value);
        Ok(())
    }

    /// Writes a result that the caller may decline with null.
    pub fn set_if_asked(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not null, so the caller promised room for a `T`; C may not have aligned it.
            unsafe { self.0.write_unaligned(value) }
        }
    }

    /// Writes several results, `values.len()` being what the caller said there is room for.
    pub fn set_all(&self, values: &[T]) -> Outcome
    where
        T: Copy,
    {
        if self.0.is_null() && !values.is_empty() {
            return Err(failure(INVALID_VALUE, "the pointer for the result is null"));
        }
        for (i, value) in values.iter().enumerate() {
            // SAFETY: not null, and the caller promised room for this many.
            unsafe { self.0.add(i).write_unaligned(*value) }
        }
        Ok(())
    }

    /// The address.
    pub fn address(&self) -> usize {
        self.0 as usize
    }

    /// The same place for a result whose type another argument decides; `U` must be what the manual names.
    pub fn cast<U>(&self) -> Out<U> {
        Out(self.0.cast())
    }
}

/// A pointer to `T`s of the caller, null or readable: made by callers of the driver, like [`Out`], or found in what
/// they pass.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct In<T>(*const T);

impl<T> In<T> {
    /// No values.
    pub(crate) fn null() -> In<T> {
        In(std::ptr::null())
    }

    /// A pointer inside a structure of the caller.
    pub(crate) fn new(start: *const T) -> In<T> {
        In(start)
    }
}

impl<T: Copy> In<T> {
    /// Whether there is nothing to read.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The value at `index`, which the caller promised to exist.
    pub fn at(&self, index: usize) -> Outcome<T> {
        if self.0.is_null() {
            return Err(failure(INVALID_VALUE, "an argument is a null pointer"));
        }
        // SAFETY: not null, so the caller promised the values that the call's other arguments speak of.
        Ok(unsafe { self.0.add(index).read_unaligned() })
    }

    /// The first `n` values.
    pub fn take(&self, n: usize) -> Outcome<Vec<T>> {
        (0..n).map(|i| self.at(i)).collect()
    }
}

/// A NUL-terminated string of the caller.
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    /// The bytes before the NUL.
    pub fn bytes(&self) -> Outcome<&[u8]> {
        if self.0.is_null() {
            return Err(failure(INVALID_VALUE, "a string is a null pointer"));
        }
        // SAFETY: not null, so the caller promised a NUL-terminated string that lives as long as the call.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_bytes())
    }

    /// The string.
    pub fn utf8(&self) -> Outcome<&str> {
        std::str::from_utf8(self.bytes()?).map_err(|_| failure(INVALID_VALUE, "a string is not UTF-8"))
    }
}

/// Address of host memory that a copy reads or writes, possibly later, when a graph is launched.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host(usize);

impl Host {
    /// An address that the caller gave as a number.
    pub fn new(address: usize) -> Host {
        Host(address)
    }

    fn checked(self, bytes: usize) -> Outcome<usize> {
        if self.0 == 0 || bytes > isize::MAX as usize {
            return Err(failure(INVALID_VALUE, format!("{bytes} bytes of host memory at {:#x} cannot exist", self.0)));
        }
        Ok(self.0)
    }

    /// The number, for comparisons.
    pub fn address(self) -> usize {
        self.0
    }

    /// Reads what the caller promised to be readable.
    pub fn bytes<'a>(self, bytes: usize) -> Outcome<&'a [u8]> {
        if bytes == 0 {
            return Ok(&[]);
        }
        let start = std::ptr::with_exposed_provenance(self.checked(bytes)?);
        // SAFETY: the driver's manual makes the caller promise this many readable bytes until the copy has run.
        Ok(unsafe { std::slice::from_raw_parts(start, bytes) })
    }

    /// Writes what the caller promised to be writable.
    pub fn bytes_mut<'a>(self, bytes: usize) -> Outcome<&'a mut [u8]> {
        if bytes == 0 {
            return Ok(&mut []);
        }
        let start = std::ptr::with_exposed_provenance_mut(self.checked(bytes)?);
        // SAFETY: as in `bytes`, for writing; all copies of the simulator run under the device's lock.
        Ok(unsafe { std::slice::from_raw_parts_mut(start, bytes) })
    }
}
