//! Reading `.safetensors` files that others may have damaged or made to harm: the whole header is checked against the size
//! of the file before anything is allocated, and the tensors themselves stay in a memory map.
//!
//! Format: 8 bytes, the header's length `n` as a little-endian u64; `n` bytes of JSON that give every tensor its dtype, shape
//! and byte range; then the bytes, without gaps (<https://huggingface.co/docs/safetensors>).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use crate::element::{Element, byte_len};
use crate::error::{Error, Result};
use crate::regular_file;

/// Longest header that is read: more than a hundred times what the largest DiT needs.
pub const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Longest name of a tensor, in bytes: ten times the longest of a DiT.
pub const MAX_NAME_BYTES: usize = 500;

/// Most dimensions that a tensor may have.
pub const MAX_RANK: usize = 8;

/// An open `.safetensors` file: a checked header and a memory map of the data.
///
/// The file must not be changed while it is open; a file that another program shortens meanwhile ends this process with
/// SIGBUS, as with every memory map.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

/// One tensor of a [`SafetensorsFile`].
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Type of the elements.
    pub element: Element,
    /// Sides, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// The elements, row-major, little-endian: as many bytes as `element` and `shape` say.
    pub bytes: &'a [u8],
}

/// What a header says, checked: every range lies in the file and has the length that dtype and shape ask for.
#[derive(Debug, PartialEq, Eq)]
pub struct Header {
    /// The free text of `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Dtype, shape and place of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Type of the elements.
    pub element: Element,
    /// Sides, outermost first.
    pub shape: Vec<usize>,
    /// Bytes of the tensor, counted from the start of the file.
    pub range: Range<usize>,
}

impl SafetensorsFile {
    /// Opens `path` and checks its header; no tensor is read.
    ///
    /// # Errors
    /// [`Error::File`] when the file cannot be opened or mapped, or its header is not one (see [`Header::parse`]).
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let map = map_file(&path)?;
        let header = Header::parse(&map).map_err(|what| Error::file(&path, what))?;
        Ok(SafetensorsFile { path, map, header })
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The free text of the header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// The tensor `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let info = self.header.tensors.get(name)?;
        Some(TensorView { element: info.element, shape: &info.shape, bytes: &self.map[info.range.clone()] })
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// [`Error::File`] when there is none; the message lists some that are there.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| {
            let mut there: Vec<&str> = self.names().take(6).collect();
            if there.len() == 6 {
                there[5] = "...";
            }
            Error::file(&self.path, format!("has no tensor '{name}'; it holds: {}", there.join(", ")))
        })
    }
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.element.size()
    }

    /// Writes all elements to `out` as `f32`.
    ///
    /// # Panics
    /// When `out` has not exactly [`elements`](Self::elements) places.
    pub fn to_f32(&self, out: &mut [f32]) {
        self.element.to_f32(self.bytes, out);
    }
}

/// Maps the regular file `path` into memory, read-only.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let fail = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
    let file = regular_file::open(path).map_err(fail)?;
    // SAFETY: the map is read-only and only ever seen as bytes, for which every value is valid. Nothing here writes to files
    // that are open for reading (files are written to a temporary name and renamed, which leaves this map on the old file);
    // that other programs do not change it is the condition stated on the types that hold the map.
    unsafe { Mmap::map(&file) }.map_err(fail)
}

impl Header {
    /// Parses the header of a file with the content `file`.
    ///
    /// # Errors
    /// One sentence (without the path) when the file is too short for its header, the header is longer than
    /// [`MAX_HEADER_BYTES`] or no JSON of the format, a name is there twice, a dtype is unknown, or the byte ranges do not fit
    /// their shapes or do not cover the rest of the file exactly once.
    pub fn parse(file: &[u8]) -> std::result::Result<Header, String> {
        let Some((bytes, rest)) = file.split_first_chunk::<8>() else {
            return Err(format!("is no safetensors file: it has {} bytes", file.len()));
        };
        let length = u64::from_le_bytes(*bytes);
        if length > MAX_HEADER_BYTES && [&b"PK\x03\x04"[..], &[0x80, 2]].iter().any(|start| bytes.starts_with(start)) {
            // A zip archive or a pickle, as torch.save writes them.
            return Err("seems to be a PyTorch file: scripts/convert_weights.py makes a .safetensors file of it".into());
        }
        if length > MAX_HEADER_BYTES {
            return Err(format!(
                "claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are read, so it is damaged or no .safetensors file"
            ));
        }
        let Some((json, data)) = rest.split_at_checked(length as usize) else {
            return Err(format!("claims a header of {length} bytes but only {} follow: it was cut short", rest.len()));
        };
        let raw: RawHeader = serde_json::from_slice(json)
            .map_err(|e| format!("its header is not that of a safetensors file: {:.200}", e.to_string()))?;
        let start = file.len() - data.len();
        let mut tensors = BTreeMap::new();
        for (name, raw) in raw.tensors {
            let info = raw.check(data.len(), start).map_err(|what| format!("tensor '{name:.80}' {what}"))?;
            tensors.insert(name, info);
        }
        check_cover(&tensors, start..file.len())?;
        Ok(Header { metadata: raw.metadata, tensors })
    }
}

/// The ranges must follow each other from the first to the last byte of `data`.
fn check_cover(tensors: &BTreeMap<String, TensorInfo>, data: Range<usize>) -> std::result::Result<(), String> {
    let mut by_place: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
    by_place.sort_by_key(|(_, info)| (info.range.start, info.range.end));
    let mut end = data.start;
    for (name, info) in by_place {
        if info.range.start != end {
            let what = if info.range.start < end { "overlaps the one before it" } else { "leaves a gap before it" };
            return Err(format!("tensor '{name:.80}' {what}: the header is damaged"));
        }
        end = info.range.end;
    }
    if end != data.end {
        return Err(format!("has {} bytes that belong to no tensor: the header is damaged", data.end - end));
    }
    Ok(())
}

/// The header as it is written, not yet checked.
#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, RawTensor>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl RawTensor {
    /// Checks the tensor against `data_len` bytes of data that begin at byte `start` of the file.
    fn check(&self, data_len: usize, start: usize) -> std::result::Result<TensorInfo, String> {
        let element =
            element_of(&self.dtype).ok_or_else(|| format!("has dtype '{:.20}', which is not read here", self.dtype))?;
        if self.shape.len() > MAX_RANK {
            return Err(format!("has {} dimensions; at most {MAX_RANK} are read", self.shape.len()));
        }
        let [begin, end] = self.data_offsets;
        if begin > end || end > data_len as u64 {
            return Err(format!(
                "claims bytes {begin} to {end} of {data_len}: the file was cut short or its header is damaged"
            ));
        }
        let shape: Option<Vec<usize>> = self.shape.iter().map(|&side| usize::try_from(side).ok()).collect();
        let shape = shape.filter(|shape| byte_len(element, shape) == Some((end - begin) as usize));
        let shape = shape.ok_or_else(|| {
            format!("has shape {:?} of {}, which is not the {} bytes it claims", self.shape, self.dtype, end - begin)
        })?;
        Ok(TensorInfo { element, shape, range: start + begin as usize..start + end as usize })
    }
}

fn element_of(dtype: &str) -> Option<Element> {
    Some(match dtype {
        "BOOL" => Element::Bool,
        "U8" => Element::U8,
        "I8" => Element::I8,
        "U16" => Element::U16,
        "I16" => Element::I16,
        "U32" => Element::U32,
        "I32" => Element::I32,
        "U64" => Element::U64,
        "I64" => Element::I64,
        "F16" => Element::F16,
        "BF16" => Element::Bf16,
        "F32" => Element::F32,
        "F64" => Element::F64,
        _ => return None,
    })
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Names;

        impl<'de> Visitor<'de> for Names {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with one entry per tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    if name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
                        let begins: String = name.escape_debug().take(80).collect();
                        return Err(de::Error::custom(format!(
                            "the name of a tensor, '{begins}', has more than {MAX_NAME_BYTES} bytes or control characters"
                        )));
                    }
                    match header.tensors.entry(name) {
                        Entry::Vacant(place) => place.insert(map.next_value()?),
                        Entry::Occupied(twice) => {
                            return Err(de::Error::custom(format!("tensor '{:.80}' is there twice", twice.key())));
                        }
                    };
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(Names)
    }
}
