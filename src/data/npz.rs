//! Writing `.npz` archives (a zip of stored `.npy` files) as a stream: arrays larger than memory, and than 4 GiB, are fine.
//!
//! The format is that of PKWARE's APPNOTE 6.3: local headers (4.3.7) with the ZIP64 extra field (4.5.3) where a file needs
//! it, the central directory (4.3.12) and its end (4.3.14 to 4.3.16).

use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;

use super::npy::NpyHeader;
use crate::atomic_file::AtomicFile;
use crate::element::{Element, byte_len};
use crate::error::{Error, Result};

/// From this value on a 32-bit field of the archive moves to the ZIP64 extra field.
const ZIP64: u64 = u32::MAX as u64;

/// An archive being written. Nothing has the final name before [`finish`](Self::finish).
///
/// ```no_run
/// # use dtr_fused::{data::npz::NpzWriter, element::Element};
/// let mut npz = NpzWriter::create("samples.npz")?;
/// npz.begin("arr_0", Element::U8, &[2, 8, 8, 3])?; // N, H, W, C, as the ADM evaluation suite reads them
/// npz.write(&[0; 2 * 8 * 8 * 3])?;
/// npz.begin("arr_1", Element::I64, &[2])?;
/// npz.write(&[0; 2 * 8])?;
/// npz.finish()?;
/// # Ok::<(), dtr_fused::Error>(())
/// ```
pub struct NpzWriter {
    file: AtomicFile,
    position: u64,
    members: Vec<Member>,
    // Of the last member:
    element: Element,
    shape: Vec<usize>,
    header: Vec<u8>,
    missing: u64,           // bytes of elements that it still needs
    crc: crc32fast::Hasher, // of its elements so far
}

/// One file of the archive.
struct Member {
    name: String, // with .npy
    offset: u64,  // of its local header
    size: u64,
    wide: bool, // whether its local header has room for a size of 64 bits
    crc: u32,
}

impl NpzWriter {
    /// Begins the archive that will be `path`.
    ///
    /// # Errors
    /// [`Error::File`] when the directory cannot be written.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let file = AtomicFile::create(path)?;
        Ok(NpzWriter {
            file,
            position: 0,
            members: Vec::new(),
            element: Element::U8,
            shape: Vec::new(),
            header: Vec::new(),
            missing: 0,
            crc: crc32fast::Hasher::new(),
        })
    }

    /// Begins the array `name` of `shape`; its elements follow by [`write`](Self::write).
    ///
    /// # Errors
    /// [`Error::Usage`] when the array before it is not complete, the name is longer than 1000 bytes or NumPy has no such
    /// elements; [`Error::File`] when writing fails.
    pub fn begin(&mut self, name: &str, element: Element, shape: &[usize]) -> Result<()> {
        self.end_member()?;
        let header = NpyHeader::bytes(element, shape).filter(|_| name.len() <= 1000);
        let (Some(header), Some(data)) = (header, byte_len(element, shape)) else {
            return Err(Error::usage(format!(
                "'{name:.80}' of {shape:?} {element:?} cannot be an array of an .npz file"
            )));
        };
        let size = header.len() as u64 + data as u64;
        let wide = size >= ZIP64;
        self.members.push(Member { name: format!("{name}.npy"), offset: self.position, size, wide, crc: 0 });
        let local = self.members[self.members.len() - 1].local_header();
        self.put(&local)?;
        self.put(&header)?;
        (self.element, self.shape, self.header) = (element, shape.to_vec(), header);
        (self.missing, self.crc) = (data as u64, crc32fast::Hasher::new());
        Ok(())
    }

    /// Ends the array begun last after what was written, the first `len` along its first side: for those who learn only then how
    /// many there are.
    ///
    /// # Errors
    /// [`Error::Usage`] when what was written is not `len` of them.
    pub fn cut(&mut self, len: usize) -> Result<()> {
        let mut shape = self.shape.clone();
        shape.iter_mut().take(1).for_each(|side| *side = len);
        // It has to fit where the first one stands.
        let header = NpyHeader::bytes(self.element, &shape).filter(|header| header.len() == self.header.len());
        let written = byte_len(self.element, &self.shape).map(|all| all - self.missing as usize);
        match (self.members.last_mut(), header) {
            (Some(member), Some(header)) if byte_len(self.element, &shape) == written => {
                member.size -= self.missing;
                (self.shape, self.header, self.missing) = (shape, header, 0);
                Ok(())
            }
            _ => Err(Error::usage(format!("what was written of an array of {:?} is not {len} of them", self.shape))),
        }
    }

    /// Appends elements (little-endian, row-major) to the array begun last, in pieces of any length.
    ///
    /// # Errors
    /// [`Error::Usage`] when that is more than its shape asks for; [`Error::File`] when writing fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let left = self.missing.checked_sub(bytes.len() as u64);
        self.missing = left.ok_or_else(|| Error::usage("more was written to an array than its shape asks for"))?;
        self.crc.update(bytes);
        self.put(bytes)
    }

    /// Writes the directory of the archive and gives the file its name.
    ///
    /// # Errors
    /// [`Error::Usage`] when the last array is not complete; [`Error::File`] when writing fails.
    pub fn finish(mut self) -> Result<()> {
        self.end()?;
        self.file.commit()
    }

    /// As [`finish`](Self::finish), but replaces nothing that is there by now: returns the name that it has
    /// ([`AtomicFile::commit_new`]).
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn finish_new(mut self) -> Result<PathBuf> {
        self.end()?;
        self.file.commit_new()
    }

    fn end(&mut self) -> Result<()> {
        self.end_member()?;
        let start = self.position;
        for i in 0..self.members.len() {
            let entry = self.members[i].central_header();
            self.put(&entry)?;
        }
        let end = end_of_directory(self.members.len() as u64, start, self.position - start);
        self.put(&end)
    }

    /// Completes the array begun last, if there is one: its checksum, and after a cut its size, are known only now.
    fn end_member(&mut self) -> Result<()> {
        if self.missing > 0 {
            return Err(Error::usage(format!("{} bytes of an array were not written", self.missing)));
        }
        if let Some(member) = self.members.last_mut() {
            let mut crc = crc32fast::Hasher::new();
            crc.update(&self.header);
            crc.combine(&self.crc);
            member.crc = crc.finalize();
            let headers = [member.local_header(), self.header.clone()].concat();
            let (start, end) = (member.offset, self.position);
            let patch = |file: &mut AtomicFile| -> io::Result<()> {
                file.seek(SeekFrom::Start(start))?;
                file.write_all(&headers)?;
                file.seek(SeekFrom::Start(end))?;
                Ok(())
            };
            patch(&mut self.file).map_err(|e| self.file.error(&e))?;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.position += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|e| self.file.error(&e))
    }
}

impl Member {
    fn local_header(&self) -> Vec<u8> {
        let mut extra = Vec::new();
        // An array that was cut may be small by now, but its elements stand behind a header with this room.
        let size = if self.wide {
            extra.extend(1u16.to_le_bytes());
            extra.extend(16u16.to_le_bytes());
            extra.extend(self.size.to_le_bytes()); // as it is
            extra.extend(self.size.to_le_bytes()); // compressed
            u32::MAX
        } else {
            self.size as u32
        };
        let mut header = b"PK\x03\x04".to_vec();
        self.common_fields(&mut header, size, extra.len());
        header.extend(self.name.as_bytes());
        header.extend(extra);
        header
    }

    fn central_header(&self) -> Vec<u8> {
        // The extra field holds what did not fit, in this order.
        let large = if self.size >= ZIP64 { vec![self.size, self.size] } else { vec![] };
        let far = (self.offset >= ZIP64).then_some(self.offset);
        let wide: Vec<u8> = large.into_iter().chain(far).flat_map(u64::to_le_bytes).collect();
        let mut extra = Vec::new();
        if !wide.is_empty() {
            extra.extend(1u16.to_le_bytes());
            extra.extend((wide.len() as u16).to_le_bytes());
            extra.extend(wide);
        }
        let mut header = b"PK\x01\x02".to_vec();
        header.extend(45u16.to_le_bytes()); // made by version 4.5
        self.common_fields(&mut header, self.size.min(ZIP64) as u32, extra.len());
        header.extend([0; 10]); // comment, disk, attributes
        header.extend((self.offset.min(ZIP64) as u32).to_le_bytes());
        header.extend(self.name.as_bytes());
        header.extend(extra);
        header
    }

    /// The fields that local and central headers share, from the version needed to the length of the extra field.
    fn common_fields(&self, header: &mut Vec<u8>, size: u32, extra: usize) {
        header.extend(45u16.to_le_bytes()); // needs version 4.5
        header.extend([0, 0, 0, 0]); // no flags, stored
        header.extend([0, 0, 0x21, 0]); // midnight of 1980-01-01: equal samples make equal files
        header.extend(self.crc.to_le_bytes());
        header.extend(size.to_le_bytes());
        header.extend(size.to_le_bytes());
        header.extend((self.name.len() as u16).to_le_bytes());
        header.extend((extra as u16).to_le_bytes());
    }
}

/// The end of the archive: the ZIP64 records where `members`, the `start` or the `length` of the directory need them, then
/// the plain one.
fn end_of_directory(members: u64, start: u64, length: u64) -> Vec<u8> {
    let mut end = Vec::new();
    if members >= u64::from(u16::MAX) || start >= ZIP64 || length >= ZIP64 {
        end.extend(b"PK\x06\x06");
        end.extend(44u64.to_le_bytes()); // bytes of this record that follow
        end.extend(45u16.to_le_bytes());
        end.extend(45u16.to_le_bytes());
        end.extend([0; 8]); // disks
        for number in [members, members, length, start] {
            end.extend(number.to_le_bytes());
        }
        end.extend(b"PK\x06\x07");
        end.extend([0; 4]);
        end.extend((start + length).to_le_bytes()); // where the record above stands
        end.extend(1u32.to_le_bytes());
    }
    let few = members.min(u64::from(u16::MAX)) as u16;
    end.extend(b"PK\x05\x06");
    end.extend([0; 4]); // disks
    end.extend(few.to_le_bytes());
    end.extend(few.to_le_bytes());
    end.extend((length.min(ZIP64) as u32).to_le_bytes());
    end.extend((start.min(ZIP64) as u32).to_le_bytes());
    end.extend([0; 2]); // no comment
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The little-endian number of `N` bytes at `at`.
    fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
        let mut number = [0; 8];
        number[..N].copy_from_slice(&bytes[at..at + N]);
        u64::from_le_bytes(number)
    }

    /// 50,000 images of 256 x 256 are such a file. Byte by byte as in sections 4.3.7, 4.3.12 and 4.5.3.
    #[test]
    fn what_does_not_fit_32_bits_is_in_the_extra_field() {
        let (small, large, far) = (123, 9_830_400_128, 5_000_000_000);
        for (size, offset) in [(small, 77), (large, 77), (small, far), (large, far)] {
            let member = Member { name: "arr_0.npy".into(), offset, size, wide: size == large, crc: 0x1234_5678 };
            let wide = |n: u64| if n == small || n == 77 { n } else { 0xFFFF_FFFF };

            let local = member.local_header();
            assert_eq!([number::<4>(&local, 18), number::<4>(&local, 22)], [wide(size); 2]);
            let extra = &local[30 + 9..];
            assert_eq!(number::<2>(&local, 28), extra.len() as u64);
            if size == large {
                assert_eq!([number::<2>(extra, 0), number::<2>(extra, 2)], [1, 16]);
                assert_eq!(([number::<8>(extra, 4), number::<8>(extra, 12)], extra.len()), ([size; 2], 20));
            } else {
                assert_eq!(extra, [0; 0]);
            }

            let central = member.central_header();
            assert_eq!([number::<4>(&central, 20), number::<4>(&central, 24)], [wide(size); 2]);
            assert_eq!(number::<4>(&central, 42), wide(offset));
            let extra = &central[46 + 9..];
            assert_eq!(number::<2>(&central, 30), extra.len() as u64);
            let there: Vec<u64> = extra.get(4..).unwrap_or_default().chunks(8).map(|n| number::<8>(n, 0)).collect();
            let mut expected = if size == large { vec![size, size] } else { vec![] };
            expected.extend((offset == far).then_some(offset));
            assert_eq!(there, expected);
            if !expected.is_empty() {
                assert_eq!([number::<2>(extra, 0), number::<2>(extra, 2)], [1, 8 * expected.len() as u64]);
            }
        }
    }

    #[test]
    fn an_array_that_is_cut_is_as_one_that_was_begun_with_its_length() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("x.npz");
        let written = |begun: usize, len: usize| {
            let mut npz = NpzWriter::create(&path).unwrap();
            npz.begin("arr_0", Element::F32, &[begun, 2, 3]).unwrap();
            (0..len as u8).for_each(|i| npz.write(&[i; 24]).unwrap());
            for wrong in [len + 1, len.wrapping_sub(1), usize::MAX] {
                assert!(npz.cut(wrong).unwrap_err().to_string().contains("is not"));
            }
            npz.cut(len).unwrap();
            assert!(npz.write(&[0]).is_err(), "it has ended");
            npz.begin("arr_1", Element::I64, &[len]).unwrap();
            npz.write(&vec![7; 8 * len]).unwrap();
            npz.finish().unwrap();
            std::fs::read(&path).unwrap()
        };
        for len in [0, 1, 9, 10] {
            let known = written(len, len);
            assert!([10, 12_345_678, 50_000].iter().all(|&begun| written(begun, len) == known), "{len}");
        }
        // 13 GB begun: what takes 64 bits has its room in the local header, and says what is there.
        let archive = written(1 << 29, 2);
        let wide = number::<4>(&archive, 18) == 0xFFFF_FFFF && number::<2>(&archive, 28) == 20;
        let (size, extra) = (128 + 48, &archive[30 + 9..]);
        assert!(wide && [number::<8>(extra, 4), number::<8>(extra, 12)] == [size; 2]);
        assert_eq!(extra[20..][..size as usize], written(2, 2)[30 + 9..][..size as usize], "the array");
        assert_eq!(number::<4>(&archive, 14), number::<4>(&written(2, 2), 14), "its checksum");
        let central = archive.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
        assert_eq!([20, 24].map(|at| number::<4>(&archive, central + at)), [size; 2]);
    }

    /// Sections 4.3.14 to 4.3.16.
    #[test]
    fn the_end_of_a_large_archive_is_found() {
        let far = 9_830_400_500;
        for (members, start, length) in [(2, far, 130), (70_000, 7_000_000, far), (70_000, 7_000_000, 4_900_000)] {
            let end = end_of_directory(members, start, length);
            assert_eq!(end.len(), 56 + 20 + 22);
            let (record, rest) = end.split_at(56);
            let (locator, plain) = rest.split_at(20);
            assert!(record.starts_with(b"PK\x06\x06") && locator.starts_with(b"PK\x06\x07"));
            assert_eq!(number::<8>(record, 4), 56 - 12);
            let numbers = [24, 32, 40, 48].map(|at| number::<8>(record, at));
            assert_eq!(numbers, [members, members, length, start]);
            assert_eq!([number::<4>(locator, 4), number::<4>(locator, 16)], [0, 1]);
            assert_eq!(number::<8>(locator, 8), start + length, "where the record is");
            assert!(plain.starts_with(b"PK\x05\x06"));
            assert_eq!([8, 10].map(|at| number::<2>(plain, at)), [members.min(0xFFFF); 2]);
            assert_eq!([12, 16].map(|at| number::<4>(plain, at)), [length, start].map(|n| n.min(0xFFFF_FFFF)));
        }
        assert_eq!(end_of_directory(2, 1000, 130).len(), 22, "a small one has the plain record alone");
    }
}
