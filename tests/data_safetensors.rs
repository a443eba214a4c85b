//! The reader of `.safetensors` headers: right on good files, one sentence on bad ones, whatever the bytes.

use dtr_fused::element::Element;
use dtr_fused::safetensors_file::{Header, MAX_HEADER_BYTES, SafetensorsFile};
use proptest::prelude::*;

/// A file with the header `json` and `data` zero bytes behind it.
fn file(json: &str, data: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    Header::parse(bytes).expect_err("should be refused")
}

#[test]
fn reads_what_the_reference_library_writes() {
    use safetensors::tensor::{Dtype, TensorView};
    let weights: Vec<u8> = [1.5f32, -2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let step: Vec<u8> = 7u64.to_le_bytes().to_vec();
    let tensors = [
        ("weight", TensorView::new(Dtype::F32, vec![2, 3], &weights).unwrap()),
        ("step", TensorView::new(Dtype::U64, vec![], &step).unwrap()),
        ("nothing", TensorView::new(Dtype::F16, vec![0, 3], &[]).unwrap()),
    ];
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    std::fs::write(&path, safetensors::serialize(tensors, Some(metadata)).unwrap()).unwrap();

    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["nothing", "step", "weight"]);
    assert_eq!(file.metadata()["format"], "pt");
    let weight = file.tensor("weight").unwrap();
    assert_eq!((weight.element, weight.shape, weight.elements()), (Element::F32, &[2, 3][..], 6));
    let mut out = [f32::NAN; 6];
    weight.to_f32(&mut out);
    assert_eq!(out, [1.5, -2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(file.tensor("step").unwrap().bytes, step);
    assert_eq!(file.tensor("nothing").unwrap().elements(), 0);
    let error = file.tensor("bias").unwrap_err().to_string();
    assert!(error.contains("a.safetensors: has no tensor 'bias'; it holds: nothing, step, weight"), "{error}");
}

#[test]
fn names_that_no_model_has_are_refused() {
    let named = |name: &str| file(&format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#), 4);
    assert!(Header::parse(&named(&"q".repeat(500))).is_ok());
    let long = refusal(&named(&"q".repeat(501)));
    assert!(long.contains("'qqqq") && long.contains("more than 500 bytes") && long.len() < 400, "{long}");
    for control in [r"a\u001b[2J", r"a\nb", r"\u0000"] {
        let said = refusal(&named(control));
        assert!(said.contains("control characters") && !said.chars().any(char::is_control), "{said}");
    }
}

#[test]
fn sizes_that_lie_are_refused_before_anything_is_allocated() {
    let huge = (1u64 << 60).to_le_bytes();
    assert!(refusal(&huge).contains("claims a header of 1152921504606846976 bytes; at most"));
    assert!(refusal(&u64::MAX.to_le_bytes()).contains("at most"));
    assert!(refusal(&(MAX_HEADER_BYTES).to_le_bytes()).contains("only 0 follow"));
    assert!(refusal(b"abc").contains("it has 3 bytes"));
    assert!(refusal(&[]).contains("it has 0 bytes"));
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let refused = |dtype: &str, shape: &str, offsets: &str| refusal(&file(&tensor(dtype, shape, offsets), 16));
    assert!(refused("F32", "[1152921504606846976]", "[0,16]").contains("not the 16 bytes it claims"));
    assert!(refused("F32", "[1152921504606846976,1152921504606846976]", "[0,16]").contains("not the 16 bytes"));
    assert!(refused("F32", "[0,1152921504606846976,1152921504606846976]", "[0,0]").contains("not the 0 bytes"));
    assert!(refused("U8", "[18446744073709551615]", "[0,18446744073709551615]").contains("of 16"));
    assert!(refused("F32", "[5]", "[0,20]").contains("claims bytes 0 to 20 of 16"));
    assert!(refused("F32", "[5]", "[16,0]").contains("claims bytes 16 to 0"));
    assert!(refused("F32", "[3]", "[0,12]").contains("4 bytes that belong to no tensor"));
    assert!(refused("F32", "[3]", "[4,16]").contains("leaves a gap"));
    assert!(refused("F32", "[4,1,1,1,1,1,1,1,1]", "[0,16]").contains("9 dimensions"));
    assert!(refused("F8_E4M3", "[16]", "[0,16]").contains("dtype 'F8_E4M3'"));
    assert!(refused("F32", "[-4]", "[0,16]").contains("not that of a safetensors file"));
    assert!(refused("F32", "[4.5]", "[0,16]").contains("not that of a safetensors file"));
    assert!(Header::parse(&file(&tensor("F32", "[2,2]", "[0,16]"), 16)).is_ok());
}

#[test]
fn ranges_may_not_overlap_and_names_not_repeat() {
    let entry =
        |name: &str, offsets: &str| format!(r#""{name}":{{"dtype":"U8","shape":[4],"data_offsets":{offsets}}}"#);
    let two = |a: String, b: String| file(&format!("{{{a},{b}}}"), 8);
    assert!(refusal(&two(entry("a", "[0,4]"), entry("b", "[2,6]"))).contains("'b' overlaps"));
    assert!(refusal(&two(entry("a", "[0,4]"), entry("b", "[0,4]"))).contains("overlaps"));
    assert!(refusal(&two(entry("a", "[0,4]"), entry("a", "[4,8]"))).contains("'a' is there twice"));
    assert!(Header::parse(&two(entry("b", "[4,8]"), entry("a", "[0,4]"))).is_ok());
    let long = "x".repeat(1 << 20);
    assert!(
        refusal(&two(entry(&long, "[0,4]"), entry("a", "[0,4]"))).len() < 400,
        "a name from the file fills the screen"
    );
    let deep = format!("{{\"a\":{}", "[".repeat(1 << 16));
    assert!(refusal(&file(&deep, 0)).contains("not that of a safetensors file"));
}

#[test]
fn things_that_are_no_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = SafetensorsFile::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    let error = SafetensorsFile::open(dir.path().join("missing.safetensors")).unwrap_err().to_string();
    assert!(error.contains("missing.safetensors: cannot be read"), "{error}");
    let empty = dir.path().join("empty.safetensors");
    std::fs::write(&empty, []).unwrap();
    let error = SafetensorsFile::open(&empty).unwrap_err().to_string();
    assert!(error.contains("it has 0 bytes"), "{error}");
}

/// A number that is often one of the treacherous ones.
fn treacherous() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..20, Just(1 << 60), Just(1 << 61), Just(1 << 63), Just(u64::MAX), any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn any_header_that_is_accepted_describes_the_file(
        entries in proptest::collection::vec(
            (prop_oneof!["F32", "F16", "U8", "I64", "Q4"], proptest::collection::vec(treacherous(), 0..4), treacherous(), treacherous()),
            0..4,
        ),
        data in 0usize..64,
    ) {
        let json: Vec<String> = entries
            .iter()
            .enumerate()
            .map(|(i, (dtype, shape, a, b))| format!(r#""t{i}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{a},{b}]}}"#))
            .collect();
        let bytes = file(&format!("{{{}}}", json.join(",")), data);
        if let Ok(header) = Header::parse(&bytes) {
            let total: usize = header.tensors.values().map(|info| info.range.len()).sum();
            prop_assert_eq!(total, data);
            for info in header.tensors.values() {
                prop_assert!(info.range.end <= bytes.len());
                prop_assert_eq!(info.shape.iter().product::<usize>() * info.element.size(), info.range.len());
            }
        }
    }

    #[test]
    fn a_damaged_file_is_parsed_or_refused(place in 0usize..90, value in any::<u8>(), cut in 0usize..106) {
        let json = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}"#;
        let mut bytes = file(json, 16);
        prop_assert!(Header::parse(&bytes).is_ok());
        bytes[place] = value;
        let _ = Header::parse(&bytes);
        bytes.truncate(cut);
        prop_assert!(Header::parse(&bytes).is_err());
    }
}
