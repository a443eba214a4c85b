//! The element types of array files (`.safetensors`, `.npy`) and how their little-endian bytes become numbers.

use half::{bf16, f16};

/// Type of the elements of an array in a file. All are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// One byte, zero or not.
    Bool,
    /// 8-bit unsigned integer.
    U8,
    /// 8-bit signed integer.
    I8,
    /// 16-bit unsigned integer.
    U16,
    /// 16-bit signed integer.
    I16,
    /// 32-bit unsigned integer.
    U32,
    /// 32-bit signed integer.
    I32,
    /// 64-bit unsigned integer.
    U64,
    /// 64-bit signed integer.
    I64,
    /// IEEE 754 half precision.
    F16,
    /// The upper 16 bits of an `f32`.
    Bf16,
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 double precision.
    F64,
}

impl Element {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Element::Bool | Element::U8 | Element::I8 => 1,
            Element::U16 | Element::I16 | Element::F16 | Element::Bf16 => 2,
            Element::U32 | Element::I32 | Element::F32 => 4,
            Element::U64 | Element::I64 | Element::F64 => 8,
        }
    }

    /// Whether the elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, Element::F16 | Element::Bf16 | Element::F32 | Element::F64)
    }

    /// Whether the elements are integers (`Bool` is not).
    pub fn is_integer(self) -> bool {
        !self.is_float() && self != Element::Bool
    }

    /// Converts `bytes` to `f32`, rounding to nearest where `f32` cannot hold the number: `bytes.len() == out.len() * size`.
    ///
    /// # Panics
    /// When the lengths do not fit together.
    pub fn to_f32(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Element::Bool => convert(bytes, out, |[b]: [u8; 1]| f32::from(u8::from(b != 0))),
            Element::U8 => convert(bytes, out, |[b]: [u8; 1]| f32::from(b)),
            Element::I8 => convert(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
            Element::U16 => convert(bytes, out, |b| f32::from(u16::from_le_bytes(b))),
            Element::I16 => convert(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
            Element::U32 => convert(bytes, out, |b| u32::from_le_bytes(b) as f32),
            Element::I32 => convert(bytes, out, |b| i32::from_le_bytes(b) as f32),
            Element::U64 => convert(bytes, out, |b| u64::from_le_bytes(b) as f32),
            Element::I64 => convert(bytes, out, |b| i64::from_le_bytes(b) as f32),
            Element::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Element::Bf16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Element::F32 => convert(bytes, out, f32::from_le_bytes),
            Element::F64 => convert(bytes, out, |b| f64::from_le_bytes(b) as f32),
        }
    }

    /// The integer in `bytes` (exactly one element); `None` for types that hold no integers.
    ///
    /// # Panics
    /// When `bytes` is not one element long.
    pub fn to_integer(self, bytes: &[u8]) -> Option<i128> {
        Some(match self {
            Element::U8 => i128::from(u8::from_le_bytes(one(bytes))),
            Element::I8 => i128::from(i8::from_le_bytes(one(bytes))),
            Element::U16 => i128::from(u16::from_le_bytes(one(bytes))),
            Element::I16 => i128::from(i16::from_le_bytes(one(bytes))),
            Element::U32 => i128::from(u32::from_le_bytes(one(bytes))),
            Element::I32 => i128::from(i32::from_le_bytes(one(bytes))),
            Element::U64 => i128::from(u64::from_le_bytes(one(bytes))),
            Element::I64 => i128::from(i64::from_le_bytes(one(bytes))),
            _ => return None,
        })
    }
}

/// Bytes of an array of `shape`; `None` when that does not fit in a `usize`.
pub fn byte_len(element: Element, shape: &[usize]) -> Option<usize> {
    // An empty array is empty even if another side is huge; checking the other sides keeps later products safe.
    shape
        .iter()
        .filter(|&&side| side != 0)
        .try_fold(element.size(), |n, &side| n.checked_mul(side))
        .map(|n| if shape.contains(&0) { 0 } else { n })
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    assert_eq!(bytes.len(), out.len() * N, "bytes of the elements");
    for (x, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *x = number(*b);
    }
}

fn one<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("bytes of one element")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_out_of_their_bytes() {
        let float = |element: Element, bytes: &[u8]| {
            let mut out = [f32::NAN];
            element.to_f32(bytes, &mut out);
            out[0]
        };
        assert_eq!(float(Element::F16, &0xC580u16.to_le_bytes()), -5.5);
        assert_eq!(float(Element::Bf16, &0xC0B0u16.to_le_bytes()), -5.5);
        assert_eq!(float(Element::F32, &(-5.5f32).to_le_bytes()), -5.5);
        assert_eq!(float(Element::F64, &(-5.5f64).to_le_bytes()), -5.5);
        assert_eq!(float(Element::I8, &[0xFB]), -5.0);
        assert_eq!(float(Element::U64, &u64::MAX.to_le_bytes()), 18_446_744_073_709_551_616.0);
        assert_eq!(float(Element::Bool, &[7]), 1.0);
        assert_eq!(Element::I64.to_integer(&(-2i64).to_le_bytes()), Some(-2));
        assert_eq!(Element::U64.to_integer(&u64::MAX.to_le_bytes()), Some(i128::from(u64::MAX)));
        assert_eq!(Element::F32.to_integer(&[0; 4]), None);
    }

    #[test]
    fn sizes_that_overflow_are_seen() {
        assert_eq!(byte_len(Element::F32, &[2, 3]), Some(24));
        assert_eq!(byte_len(Element::F32, &[]), Some(4));
        assert_eq!(byte_len(Element::U8, &[1 << 60, 8]), Some(1 << 63));
        assert_eq!(byte_len(Element::F64, &[1 << 60, 8]), None);
        assert_eq!(byte_len(Element::F32, &[0, 1 << 40]), Some(0));
        assert_eq!(byte_len(Element::F32, &[1 << 40, 0, 1 << 40]), None);
    }
}
