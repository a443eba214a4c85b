//! `.npy` headers and `.npz` archives: right on good files, one sentence on bad ones.

use dtr_fused::data::npy::{self, NpyFile, NpyHeader};
use dtr_fused::data::npz::NpzWriter;
use dtr_fused::element::{Element, byte_len};
use proptest::prelude::*;

/// A file of format `version` with the header `text` and `data` zero bytes behind it.
fn file(version: u8, text: &str, data: usize) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY".to_vec();
    bytes.extend([version, 0]);
    if version == 1 {
        bytes.extend((text.len() as u16).to_le_bytes());
    } else {
        bytes.extend((text.len() as u32).to_le_bytes());
    }
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn header(descr: &str, fortran: &str, shape: &str) -> String {
    format!("{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n")
}

fn refusal(bytes: &[u8]) -> String {
    NpyHeader::parse(bytes).expect_err("should be refused")
}

#[test]
fn reads_every_version_and_spelling() {
    let parsed = |version, text: &str, data| {
        let header = NpyHeader::parse(&file(version, text, data)).unwrap_or_else(|e| panic!("{text}: {e}"));
        (header.element, header.shape)
    };
    for version in 1..=3 {
        assert_eq!(parsed(version, &header("'<f4'", "False", "(2, 3)"), 24), (Element::F32, vec![2, 3]));
    }
    assert_eq!(parsed(1, &header("'<i8'", "False", "(4,)"), 32), (Element::I64, vec![4]));
    assert_eq!(parsed(1, &header("'|u1'", "True", "(4,)"), 4), (Element::U8, vec![4]));
    assert_eq!(parsed(1, &header("'>u1'", "True", "(1, 4)"), 4), (Element::U8, vec![1, 4]));
    assert_eq!(parsed(1, &header("'<f8'", "False", "()"), 8), (Element::F64, vec![]));
    assert_eq!(parsed(1, &header("'<f2'", "False", "(0, 5)"), 0), (Element::F16, vec![0, 5]));
    assert_eq!(parsed(1, r#"{"shape":(2L,3L),"fortran_order":False,"descr":"<i4"}"#, 24), (Element::I32, vec![2, 3]));
}

#[test]
fn headers_that_lie_or_mean_something_else_are_refused() {
    let refused =
        |descr: &str, fortran: &str, shape: &str, data| refusal(&file(1, &header(descr, fortran, shape), data));
    assert!(refusal(b"").contains("no .npy file"));
    assert!(refusal(b"\x93NUMPX\x01\x00").contains("no .npy file"));
    assert!(refusal(b"\x93NUMPY\x01\x00\x10").contains("cut short"));
    assert!(refusal(b"\x93NUMPY\x02\x00\xFF\xFF\xFF\xFF").contains("claims a header of 4294967295 bytes; at most"));
    assert!(refusal(b"\x93NUMPY\x01\x00\x76\x00{'descr'").contains("118 bytes but only 8 follow"));
    assert!(refusal(b"\x93NUMPY\x09\x00\x00\x00").contains("version 9"));
    assert!(refused("'<f4'", "False", "(1152921504606846976, 4)", 16).contains("has 16 bytes of data"));
    assert!(refused("'<f4'", "False", "(99999999999999999999999,)", 16).contains("not that of a plain array"));
    assert!(refused("'<f4'", "False", "(-4,)", 16).contains("not that of a plain array"));
    assert!(refused("'<f4'", "False", "(1,1,1,1,1,1,1,1,4)", 16).contains("not that of a plain array"));
    assert!(refused("'<f4'", "False", "(5,)", 16).contains("has 16 bytes of data"));
    assert!(refused("'<f4'", "False", "(3,)", 16).contains("has 16 bytes of data"));
    assert!(refused("'<f4'", "True", "(2, 2)", 16).contains("Fortran order"));
    assert!(refused("'>f4'", "False", "(2, 2)", 16).contains("big-endian elements ('>f4'); save it as '<f4'"));
    assert!(refused("'|O'", "False", "(2,)", 16).contains("type '|O'"));
    assert!(refused("[('a', '<f4')]", "False", "(2,)", 16).contains("not that of a plain array"));
    for text in ["", "{", "{}", "{'descr': '<f4', 'fortran_order': False}", "{'descr': '<f4' 'shape': ()}", "{'x': 1}"]
    {
        assert!(refusal(&file(1, text, 4)).contains("not that of a plain array"), "{text}");
    }
    let twice = "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': ()}";
    assert!(refusal(&file(1, twice, 4)).contains("not that of a plain array"));
    let behind = format!("{} x", header("'<f4'", "False", "()"));
    assert!(refusal(&file(1, &behind, 4)).contains("not that of a plain array"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_written_is_read(shape in proptest::collection::vec(0usize..1000, 0..=8), kind in 0usize..12) {
        use Element::*;
        let element = [Bool, U8, I8, U16, I16, U32, I32, U64, I64, F16, F32, F64][kind];
        let bytes = NpyHeader::bytes(element, &shape).unwrap();
        prop_assert_eq!(bytes.len() % 64, 0);
        prop_assert_eq!(bytes.last(), Some(&b'\n'));
        // Beyond what can be addressed nothing is read, not even if a side is 0.
        if let Some(data) = byte_len(element, &shape).filter(|&data| data < 1 << 20) {
            let mut file = bytes.clone();
            file.resize(bytes.len() + data, 0);
            prop_assert_eq!(NpyHeader::parse(&file), Ok(NpyHeader { element, shape, data_start: bytes.len() }));
        }
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(version in 1u8..4, bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = NpyHeader::parse(&bytes);
        let mut with_magic = b"\x93NUMPY".to_vec();
        with_magic.extend([version, 0]);
        with_magic.extend(&bytes);
        let _ = NpyHeader::parse(&with_magic);
    }

    #[test]
    fn any_dictionary_is_parsed_or_refused(text in r#"[{}()'", :descrfotan_hpL<|u18f4TrueFalse0-9]{0,80}"#) {
        let _ = NpyHeader::parse(&file(1, &text, 16));
    }

    #[test]
    fn a_damaged_header_is_refused_or_fits_the_file(place in 0usize..70, value in any::<u8>(), cut in 0usize..100) {
        let mut bytes = file(1, &header("'<f4'", "False", "(2, 2)"), 16);
        prop_assert!(NpyHeader::parse(&bytes).is_ok());
        prop_assert!(NpyHeader::parse(&bytes[..cut.min(bytes.len() - 1)]).is_err());
        bytes[place] = value;
        if let Ok(header) = NpyHeader::parse(&bytes) {
            prop_assert_eq!(header.shape.iter().product::<usize>() * header.element.size(), bytes.len() - header.data_start);
        }
    }
}

#[test]
fn a_file_goes_through_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.npy");
    let data: Vec<u8> = [1.0f32, -2.5].iter().flat_map(|x| x.to_le_bytes()).collect();
    npy::write(&path, Element::F32, &[2], &data).unwrap();
    let file = NpyFile::open(&path).unwrap();
    assert_eq!((file.view().element, file.view().shape, file.view().bytes), (Element::F32, &[2][..], &data[..]));
    let error = npy::write(&path, Element::F32, &[3], &data).unwrap_err().to_string();
    assert!(error.contains("8 bytes are no array of [3] F32"), "{error}");
    let error = npy::write(dir.path().join("missing/a.npy"), Element::F32, &[2], &data).unwrap_err().to_string();
    assert!(error.contains("missing/a.npy: cannot be written"), "{error}");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "temporary files are left behind");
}

/// The members of a stored zip archive, read by its central directory; every field the writer sets is checked.
fn unzip(zip: &[u8]) -> Vec<(String, Vec<u8>)> {
    let u16_at = |at: usize| usize::from(u16::from_le_bytes(zip[at..at + 2].try_into().unwrap()));
    let u32_at = |at: usize| u32::from_le_bytes(zip[at..at + 4].try_into().unwrap()) as usize;
    let end = zip.len() - 22;
    assert_eq!(&zip[end..end + 4], b"PK\x05\x06");
    let (count, length, mut at) = (u16_at(end + 10), u32_at(end + 12), u32_at(end + 16));
    assert_eq!((u16_at(end + 8), at + length), (count, end));
    let mut members = Vec::new();
    for _ in 0..count {
        assert_eq!(&zip[at..at + 4], b"PK\x01\x02");
        let (crc, size, name, extra, local) =
            (u32_at(at + 16), u32_at(at + 20), u16_at(at + 28), u16_at(at + 30), u32_at(at + 42));
        assert_eq!((u16_at(at + 10), u32_at(at + 24)), (0, size), "stored");
        let name = &zip[at + 46..at + 46 + name];
        assert_eq!(&zip[local..local + 4], b"PK\x03\x04");
        assert_eq!(zip[local + 4..local + 28], zip[at + 6..at + 30], "the two headers differ");
        assert_eq!(&zip[local + 30..local + 30 + name.len()], name);
        let start = local + 30 + name.len() + u16_at(local + 28);
        let data = &zip[start..start + size];
        assert_eq!(crc32fast::hash(data) as usize, crc);
        members.push((String::from_utf8(name.to_vec()).unwrap(), data.to_vec()));
        at += 46 + name.len() + extra;
    }
    assert_eq!(at, end);
    members
}

#[test]
fn archives_hold_what_was_written_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("samples.npz");
    let pixels: Vec<u8> = (0..2 * 4 * 4 * 3).collect();
    let labels: Vec<u8> = [3i64, -1].iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut npz = NpzWriter::create(&path).unwrap();
    npz.begin("arr_0", Element::U8, &[2, 4, 4, 3]).unwrap();
    pixels.chunks(7).for_each(|piece| npz.write(piece).unwrap());
    npz.begin("arr_1", Element::I64, &[2]).unwrap();
    npz.write(&labels).unwrap();
    assert!(!path.exists());
    npz.finish().unwrap();

    let members = unzip(&std::fs::read(&path).unwrap());
    assert_eq!(members.iter().map(|m| m.0.as_str()).collect::<Vec<_>>(), ["arr_0.npy", "arr_1.npy"]);
    let arrays: Vec<NpyHeader> = members.iter().map(|m| NpyHeader::parse(&m.1).unwrap()).collect();
    assert_eq!((arrays[0].element, &arrays[0].shape[..]), (Element::U8, &[2, 4, 4, 3][..]));
    assert_eq!((arrays[1].element, &arrays[1].shape[..]), (Element::I64, &[2][..]));
    assert_eq!(members[0].1[arrays[0].data_start..], pixels);
    assert_eq!(members[1].1[arrays[1].data_start..], labels);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "temporary files are left behind");
}

#[test]
fn archives_with_too_little_or_too_much_do_not_appear() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("samples.npz");
    let begun = || {
        let mut npz = NpzWriter::create(&path).unwrap();
        npz.begin("arr_0", Element::U8, &[2]).unwrap();
        npz.write(&[1]).unwrap();
        npz
    };
    assert!(begun().finish().unwrap_err().to_string().contains("1 bytes of an array were not written"));
    assert!(begun().begin("arr_1", Element::U8, &[2]).unwrap_err().to_string().contains("were not written"));
    assert!(begun().write(&[1, 2]).unwrap_err().to_string().contains("more was written"));
    let error = NpzWriter::create(&path).unwrap().begin("a", Element::Bf16, &[2]).unwrap_err().to_string();
    assert!(error.contains("cannot be an array"), "{error}");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}
