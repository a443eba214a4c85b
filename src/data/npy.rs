//! NumPy's array files: a parser that trusts nothing, and the header that makes numbers such a file.
//!
//! Format: `\x93NUMPY`, two bytes of version (1.0 to 3.0), the header's length (u16 in version 1, else u32, little-endian),
//! the header (a Python dictionary of `descr`, `fortran_order` and `shape`), then the elements
//! (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).

use std::io::Write;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::atomic_file::AtomicFile;
use crate::element::{Element, byte_len};
use crate::error::{Error, Result};
use crate::safetensors_file::{MAX_RANK, TensorView, map_file};

/// Longest header that is read; one that NumPy writes for a plain array has 128 bytes.
pub const MAX_HEADER_BYTES: usize = 1 << 16;

const MAGIC: &[u8] = b"\x93NUMPY";

/// A `.npy` file in a memory map, its header checked. The condition of [`SafetensorsFile`] applies: the file must not be
/// changed while it is open.
///
/// [`SafetensorsFile`]: crate::safetensors_file::SafetensorsFile
#[derive(Debug)]
pub struct NpyFile {
    path: PathBuf,
    map: Mmap,
    header: NpyHeader,
}

/// What the header of a `.npy` file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NpyHeader {
    /// Type of the elements.
    pub element: Element,
    /// Sides, outermost first.
    pub shape: Vec<usize>,
    /// Where the elements begin in the file; they reach to its end.
    pub data_start: usize,
}

impl NpyFile {
    /// Opens `path` and checks its header.
    ///
    /// # Errors
    /// [`Error::File`] when the file cannot be mapped or its header is refused by [`NpyHeader::parse`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let map = map_file(&path)?;
        let header = NpyHeader::parse(&map).map_err(|what| Error::file(&path, what))?;
        Ok(NpyFile { path, map, header })
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The array.
    pub fn view(&self) -> TensorView<'_> {
        let NpyHeader { element, ref shape, data_start } = self.header;
        TensorView { element, shape, bytes: &self.map[data_start..] }
    }
}

impl NpyHeader {
    /// Parses the header of a file with the content `file`.
    ///
    /// # Errors
    /// One sentence (without the path) when it is no `.npy` file of version 1 to 3, the header is cut short, longer than
    /// [`MAX_HEADER_BYTES`] or no such dictionary, the elements are not little-endian numbers in C order, or the file is
    /// not exactly as long as its shape asks for.
    pub fn parse(file: &[u8]) -> std::result::Result<NpyHeader, String> {
        let Some(&[major, _, ref rest @ ..]) = file.strip_prefix(MAGIC) else {
            return Err("is no .npy file".into());
        };
        let (length, rest) = match (major, rest) {
            (1, [a, b, rest @ ..]) => (usize::from(u16::from_le_bytes([*a, *b])), rest),
            (2 | 3, [a, b, c, d, rest @ ..]) => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
            (1..=3, _) => return Err("is cut short in its header".into()),
            _ => return Err(format!("has version {major} of the .npy format; 1 to 3 are read")),
        };
        if length > MAX_HEADER_BYTES {
            return Err(format!("claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"));
        }
        let Some((text, data)) = rest.split_at_checked(length) else {
            return Err(format!("claims a header of {length} bytes but only {} follow", rest.len()));
        };
        let (descr, fortran_order, shape) =
            Dictionary { text }.parse().ok_or("has a header that is not that of a plain array of numbers")?;
        let element = element_of(&descr).ok_or_else(|| match descr.strip_prefix('>').and_then(element_of) {
            Some(_) => format!("has big-endian elements ('{descr:.20}'); save it as '<{:.20}'", &descr[1..]),
            None => format!(
                "has elements of type '{descr:.20}'; save samples as float32, float16 or uint8, and labels as int64"
            ),
        })?;
        if fortran_order && shape.iter().filter(|&&side| side > 1).count() > 1 {
            return Err("is in Fortran order; save numpy.ascontiguousarray of it".into());
        }
        match byte_len(element, &shape) {
            Some(expected) if expected == data.len() => {
                Ok(NpyHeader { element, shape, data_start: file.len() - data.len() })
            }
            _ => Err(format!(
                "has {} bytes of data, which is not what its shape {shape:?} of '{descr:.20}' needs",
                data.len()
            )),
        }
    }

    /// The bytes that make `shape` numbers of type `element` a `.npy` file (version 1.0) when they
    /// follow; `None` for bf16, which NumPy does not have, and for more than [`MAX_RANK`] sides.
    pub fn bytes(element: Element, shape: &[usize]) -> Option<Vec<u8>> {
        let sides: String = shape.iter().map(|side| format!("{side}, ")).collect();
        // A tuple of one needs its comma, the others look better without the last one.
        let sides = if shape.len() == 1 { sides.trim_end() } else { sides.trim_end_matches(", ") };
        let descr = descr_of(element).filter(|_| shape.len() <= MAX_RANK)?;
        let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({sides}), }}");
        let before = MAGIC.len() + 4;
        // The data begins at a multiple of 64, after a line feed.
        let spaces = (before + text.len() + 1).next_multiple_of(64) - (before + text.len() + 1);
        text.push_str(&" ".repeat(spaces));
        text.push('\n');
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        Some(bytes)
    }
}

/// Writes `data`, the little-endian elements of an array of `shape`, to `path`, whole or not at all.
///
/// # Errors
/// [`Error::Usage`] when `data` has not the size of the array or NumPy has no such elements; [`Error::File`] when writing fails.
pub fn write(path: impl Into<PathBuf>, element: Element, shape: &[usize], data: &[u8]) -> Result<()> {
    let header = NpyHeader::bytes(element, shape).filter(|_| byte_len(element, shape) == Some(data.len()));
    let header =
        header.ok_or_else(|| Error::usage(format!("{} bytes are no array of {shape:?} {element:?}", data.len())))?;
    let mut file = AtomicFile::create(path)?;
    file.write_all(&header).and_then(|()| file.write_all(data)).map_err(|e| file.error(&e))?;
    file.commit()
}

/// The types that NumPy and this crate share, with NumPy's names on little-endian machines.
const DESCRS: [(&str, Element); 12] = [
    ("|b1", Element::Bool),
    ("|u1", Element::U8),
    ("|i1", Element::I8),
    ("<u2", Element::U16),
    ("<i2", Element::I16),
    ("<u4", Element::U32),
    ("<i4", Element::I32),
    ("<u8", Element::U64),
    ("<i8", Element::I64),
    ("<f2", Element::F16),
    ("<f4", Element::F32),
    ("<f8", Element::F64),
];

fn element_of(descr: &str) -> Option<Element> {
    // The order of the bytes of one byte does not matter.
    let kind = descr.strip_prefix('>').filter(|kind| kind.ends_with('1'));
    let kind = kind.or_else(|| descr.strip_prefix(['<', '|', '='])).unwrap_or(descr);
    DESCRS.iter().find(|(known, _)| &known[1..] == kind).map(|&(_, element)| element)
}

fn descr_of(element: Element) -> Option<&'static str> {
    DESCRS.iter().find(|&&(_, known)| known == element).map(|&(descr, _)| descr)
}

/// What is left to parse of the header's dictionary. Every method gives `None` for what it does not understand.
struct Dictionary<'a> {
    text: &'a [u8],
}

impl Dictionary<'_> {
    /// `descr`, `fortran_order` and `shape`, each exactly once, in any order.
    fn parse(mut self) -> Option<(String, bool, Vec<usize>)> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        self.expect(b'{')?;
        while !self.accept(b'}') {
            let key = self.string()?;
            self.expect(b':')?;
            let fresh = match key.as_str() {
                "descr" => descr.replace(self.string()?).is_none(),
                "fortran_order" => fortran_order.replace(self.boolean()?).is_none(),
                "shape" => shape.replace(self.tuple()?).is_none(),
                _ => false,
            };
            if !fresh || !(self.accept(b',') || self.peek() == Some(b'}')) {
                return None;
            }
        }
        if self.peek().is_some() {
            return None;
        }
        Some((descr?, fortran_order?, shape?))
    }

    /// The next byte that is no space.
    fn peek(&mut self) -> Option<u8> {
        self.text = self.text.trim_ascii_start();
        self.text.first().copied()
    }

    fn accept(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        if found {
            self.text = &self.text[1..];
        }
        found
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.accept(byte).then_some(())
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.peek().filter(|c| matches!(c, b'\'' | b'"'))?;
        let length = self.text[1..].iter().position(|&c| c == quote)?;
        let string = std::str::from_utf8(&self.text[1..1 + length]).ok()?;
        self.text = &self.text[length + 2..];
        Some(string.to_string())
    }

    fn boolean(&mut self) -> Option<bool> {
        self.peek();
        let (rest, value) = match self.text.strip_prefix(b"True") {
            Some(rest) => (rest, true),
            None => (self.text.strip_prefix(b"False")?, false),
        };
        self.text = rest;
        Some(value)
    }

    fn tuple(&mut self) -> Option<Vec<usize>> {
        let mut sides = Vec::new();
        self.expect(b'(')?;
        while !self.accept(b')') {
            self.peek();
            let digits = self.text.iter().take_while(|c| c.is_ascii_digit()).count();
            let side = std::str::from_utf8(&self.text[..digits]).ok()?.parse().ok()?;
            self.text = &self.text[digits..];
            // Python 2 wrote long integers with an L.
            self.accept(b'L');
            sides.push(side);
            if sides.len() > MAX_RANK || !(self.accept(b',') || self.peek() == Some(b')')) {
                return None;
            }
        }
        Some(sides)
    }
}
