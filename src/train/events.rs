//! TensorBoard event files: records of scalars and pictures that `tensorboard --logdir runs` shows.
//!
//! A file is a list of records: length as u64, masked CRC-32C of these 8 bytes, data, masked CRC-32C of the data, all
//! little-endian. The data are protocol buffers of the message `Event` (tensorflow/core/util/event.proto), of which this
//! writes three fields: wall time, step, and a summary of named scalars, or of a picture.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use super::run_dir::RunDir;
use crate::error::{Error, Result};
use crate::regular_file;

/// What the names of event files begin with.
pub(super) const EVENTS: &str = "events.out.tfevents";
/// What the names of those written here end with.
pub(super) const ENDING: &str = ".dtr-fused";
/// Most bytes of a run's metrics, in either form, that are read; a line takes about 500.
pub(super) const MAX_FILE_BYTES: u64 = 1 << 30;

/// Most bytes of an event file that a picture is added to.
const MOST_WITH_PICTURES: u64 = 500_000_000;

/// An event file that is appended to.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    pub(super) file: File,
}

impl EventFile {
    /// Opens the event file of `run`, or a new one. Records of steps after `step` are dropped, as is a record cut short.
    pub(super) fn open(run: &RunDir, step: u64) -> Result<Self> {
        let seconds = now() as u64;
        let name = existing(run)?.unwrap_or_else(|| format!("{EVENTS}.{seconds:010}{ENDING}"));
        let path = run.path().join(&name);
        let old = match regular_file::read(&path, MAX_FILE_BYTES) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            old => old.map_err(|e| {
                Error::file(&path, format!("cannot be read: {e}; move it away, and only TensorBoard's curves are lost"))
            })?,
        };
        let mut kept: Vec<u8> = Vec::new();
        for (record, data) in records(&old) {
            if step_of(data).is_some_and(|s| s <= step) {
                kept.extend(record);
            }
        }
        if kept.is_empty() {
            kept = record(&[field_double(1, now()), field_bytes(3, b"brain.Event:2")].concat());
        }
        if kept != old || path.is_symlink() {
            run.replace(&name, |out| out.write_all(&kept))?;
        }
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
        Ok(EventFile { path, file })
    }

    /// Appends one record with `scalars` at `step`.
    pub(super) fn append(&mut self, step: u64, scalars: &[(String, f64)]) -> Result<()> {
        let value = |(name, value): &(String, f64)| {
            field_bytes(1, &[field_bytes(1, name.as_bytes()), field_float(2, *value as f32)].concat())
        };
        self.append_summary(step, &scalars.iter().flat_map(value).collect::<Vec<u8>>())
    }

    /// Appends one record with the picture `png` at `step`, while there is room: pictures must not make the file too long to go on with.
    pub(super) fn append_picture(&mut self, step: u64, name: &str, png: &[u8]) -> Result<()> {
        if self.len()? + png.len() as u64 > MOST_WITH_PICTURES {
            return Err(Error::file(&self.path, format!("holds nearly {} MB already", MOST_WITH_PICTURES / 1_000_000)));
        }
        // A PNG begins with 8 bytes of its own, and 8 of the chunk that has width and height.
        let side =
            |at: usize| png.get(at..at + 4).map_or(0, |bytes| bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b)));
        let (width, height, rgb) = (side(16), side(20), 3);
        let image =
            [field_varint(1, height), field_varint(2, width), field_varint(3, rgb), field_bytes(4, png)].concat();
        let value = [field_bytes(1, name.as_bytes()), field_bytes(4, &image)].concat();
        self.append_summary(step, &field_bytes(1, &value))
    }

    fn append_summary(&mut self, step: u64, summary: &[u8]) -> Result<()> {
        let event = [field_double(1, now()), field_varint(2, step), field_bytes(5, summary)].concat();
        let before = self.len()?;
        let written = self.file.write_all(&record(&event));
        written.map_err(|e| {
            // Half a record would hide all that come after it.
            let _ = self.file.set_len(before);
            Error::file(&self.path, format!("cannot be written: {e}"))
        })
    }

    fn len(&self) -> Result<u64> {
        let metadata = self.file.metadata();
        metadata.map(|there| there.len()).map_err(|e| Error::file(&self.path, format!("cannot be read: {e}")))
    }
}

/// The name of the latest event file in `run` that was written here: others may write to theirs.
fn existing(run: &RunDir) -> Result<Option<String>> {
    let entries = fs::read_dir(run.path()).map_err(|e| Error::file(run.path(), format!("cannot be read: {e}")))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with(EVENTS) && name.ends_with(ENDING)).max())
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// `data` as a record.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

/// The whole records at the beginning of `file`, each with its data: up to the first that is cut short or damaged.
fn records(file: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = file;
    std::iter::from_fn(move || {
        let (length, _) = rest.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (whole, after) = rest.split_at_checked(length.checked_add(16)?)?;
        let data = &whole[12..12 + length];
        let good = record(data) == whole;
        rest = after;
        good.then_some((whole, data))
    })
}

/// The step of an event: its field 2, or 0 when it has none. `None` when the data are no event.
fn step_of(mut event: &[u8]) -> Option<u64> {
    let mut step = 0;
    while !event.is_empty() {
        let key = take_varint(&mut event)?;
        let skip = match key & 7 {
            0 => {
                let value = take_varint(&mut event)?;
                if key >> 3 == 2 {
                    step = value;
                }
                0
            }
            1 => 8,
            2 => usize::try_from(take_varint(&mut event)?).ok()?,
            5 => 4,
            _ => return None,
        };
        event = event.get(skip..)?;
    }
    Some(step)
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

// A field is its number and wire type (0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes), then its value.

fn field_varint(number: u64, value: u64) -> Vec<u8> {
    [varint(number << 3), varint(value)].concat()
}

fn field_double(number: u64, value: f64) -> Vec<u8> {
    [varint(number << 3 | 1), value.to_le_bytes().to_vec()].concat()
}

fn field_float(number: u64, value: f32) -> Vec<u8> {
    [varint(number << 3 | 5), value.to_le_bytes().to_vec()].concat()
}

fn field_bytes(number: u64, bytes: &[u8]) -> Vec<u8> {
    [varint(number << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

/// CRC-32C with the mask of the record format, so that a CRC of data that hold CRCs stays a good check.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, &byte| crc >> 8 ^ TABLE[((crc ^ u32::from(byte)) & 0xFF) as usize])
}

#[cfg(test)]
mod tests {
    use super::super::config::TrainConfig;
    use super::*;

    #[test]
    fn crc_known_answers() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    /// What every event file of TensorBoard begins with: the first record has 24 bytes.
    #[test]
    fn a_record_is_written_as_its_bytes() {
        let event = [field_double(1, 1.0), field_bytes(3, b"brain.Event:2")].concat();
        assert!(record(&event).starts_with(&[24, 0, 0, 0, 0, 0, 0, 0, 0xA3, 0x7F, 0x4B, 0x22, 9]));
    }

    #[test]
    fn an_event_is_written_as_its_bytes() {
        // wall_time = 1.0, step = 300, summary { value { tag: "a", simple_value: 2.0 } }
        let summary = field_bytes(1, &[field_bytes(1, b"a"), field_float(2, 2.0)].concat());
        let event = [field_double(1, 1.0), field_varint(2, 300), field_bytes(5, &summary)].concat();
        let expected = [9, 0, 0, 0, 0, 0, 0, 0xF0, 0x3F, 16, 0xAC, 2, 42, 10, 10, 8, 10, 1, b'a', 21, 0, 0, 0, 0x40];
        assert_eq!(event, expected);
        assert_eq!(step_of(&event), Some(300));
        assert_eq!(step_of(&event[..11]), None);
    }

    #[test]
    fn a_picture_is_written_as_its_bytes() {
        let place = tempfile::tempdir().unwrap();
        let config = TrainConfig { out: place.path().join("run").display().to_string(), ..TrainConfig::default() };
        let mut events = EventFile::open(&RunDir::create(&config).unwrap(), 0).unwrap();
        let path = place.path().join("a.png");
        crate::picture::grid_png(&path, &[0.0; 3 * 2 * 300], [1, 3, 2, 300], 1, 1, true).unwrap();
        let png = fs::read(path).unwrap();
        events.append_picture(7, "s", &png).unwrap();
        let file = fs::read(&events.path).unwrap();
        let (_, event) = records(&file).last().unwrap();
        assert_eq!(step_of(event), Some(7));
        // value { tag: "s", image { height: 6, width: 304, colorspace: 3, encoded_image_string } }, with gaps around the sample
        let image = [&[8, 6, 16, 0xB0, 2, 24, 3, 34][..], &varint(png.len() as u64), &png].concat();
        let value = [&[10, 1, b's', 34][..], &varint(image.len() as u64), &image].concat();
        let expected = [&[10][..], &varint(value.len() as u64), &value].concat();
        assert!(event.ends_with(&expected), "{:?}", &event[..60]);
        events.file.set_len(MOST_WITH_PICTURES).unwrap();
        assert!(events.append_picture(8, "s", &png).unwrap_err().to_string().contains("500 MB already"));
    }

    #[test]
    fn a_resumed_run_drops_later_and_damaged_records() {
        let place = tempfile::tempdir().unwrap();
        let config = TrainConfig { out: place.path().join("run").display().to_string(), ..TrainConfig::default() };
        let run = RunDir::create(&config).unwrap();
        let mut events = EventFile::open(&run, 0).unwrap();
        for step in 1..=5 {
            events.append(step, &[("loss".into(), 1.0 / step as f64)]).unwrap();
        }
        let whole = fs::read(&events.path).unwrap();
        let steps = |bytes: &[u8]| records(bytes).filter_map(|(_, data)| step_of(data)).collect::<Vec<_>>();
        assert_eq!(steps(&whole), [0, 1, 2, 3, 4, 5]);
        fs::write(&events.path, &whole[..whole.len() - 3]).unwrap();
        // Another program's, of later, stays as it is.
        let others = run.path().join(format!("{EVENTS}.9999999999.host.1.0"));
        fs::write(&others, &whole).unwrap();
        let events = EventFile::open(&run, 3).unwrap();
        assert_eq!(steps(&fs::read(&events.path).unwrap()), [0, 1, 2, 3]);
        assert_eq!(fs::read(&others).unwrap(), whole);
        let mut damaged = whole.clone();
        damaged[70] ^= 1;
        assert!(steps(&damaged).len() < 6);
        let huge = u64::MAX.to_le_bytes();
        assert!(steps(&[huge; 3].concat()).is_empty());
    }
}
