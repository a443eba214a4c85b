//! Folders of images: cropped as Pillow does, read as they are, refused or left out with a sentence.

use std::path::Path;
use std::sync::Arc;

use dtr_fused::data::images::ImageFolder;
use dtr_fused::data::resize::center_crop;
use dtr_fused::data::{Dataset, Loader, LoaderOptions, OpenOptions, open};
use image::{ImageFormat, Rgb, RgbImage};

/// The picture that `scripts/make_crop_cases.py` gave to Pillow.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([0, 1, 2].map(|c| (((x * x * 3 + y * y * 5 + x * y * 7 + c * 340) / 4) ^ (x * 31 + y * 17)) as u8))
    })
}

/// Saves `image` as `root/name`, in the format that the name says.
fn put(root: &Path, name: &str, image: &RgbImage) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    image.save_with_format(&path, ImageFormat::from_path(&path).unwrap()).unwrap();
}

fn refusal(root: &Path) -> String {
    ImageFolder::open(root, 8).err().expect("should be refused").to_string()
}

#[test]
fn crops_are_those_of_pillow() {
    let mut cases = 0;
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/crop_cases")).unwrap() {
        let path = entry.unwrap().path();
        let numbers: Vec<u32> =
            path.file_stem().unwrap().to_str().unwrap().split(['x', '_']).map(|n| n.parse().unwrap()).collect();
        let expected = image::open(&path).unwrap().into_rgb8();
        let found = center_crop(picture(numbers[0], numbers[1]), numbers[2]);
        assert!(found == expected, "{} differs", path.display());
        cases += 1;
    }
    assert_eq!(cases, 9);
}

#[test]
fn thin_images_do_not_grow_without_bound() {
    // Scaled as a whole, or in one direction, they would take 51 TB and 39 GB.
    for (width, height) in [(1, 10_000_000), (10_000_000, 1)] {
        let thin = RgbImage::from_pixel(width, height, Rgb([9, 8, 7]));
        let cropped = center_crop(thin, 1_300);
        assert_eq!(cropped.dimensions(), (1_300, 1_300));
        assert!(cropped.pixels().all(|p| p.0 == [9, 8, 7]));
    }
}

#[test]
fn classes_labels_values_and_flips() {
    let dir = tempfile::tempdir().unwrap();
    let left_red = RgbImage::from_fn(4, 4, |x, _| if x < 2 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) });
    put(dir.path(), "zebra/a.png", &left_red);
    put(dir.path(), "ant/2.webp", &left_red);
    put(dir.path(), "ant/10.PNG", &left_red);
    std::fs::write(dir.path().join("ant/notes.txt"), "not an image").unwrap();
    std::fs::create_dir(dir.path().join(".hidden")).unwrap();
    let folder = ImageFolder::open(dir.path(), 4).unwrap();
    assert_eq!(folder.class_names(), ["ant", "zebra"]);
    assert_eq!((folder.len(), folder.shape(), folder.num_classes()), (3, [3, 4, 4], 2));
    assert!(folder.path(0).ends_with("ant/10.PNG") && folder.path(1).ends_with("ant/2.webp"));
    assert!(
        folder.note().unwrap().ends_with(": 1 files that are no PNG, JPEG or WebP images of a class were left out")
    );
    std::fs::remove_file(dir.path().join("ant/notes.txt")).unwrap();
    assert_eq!(ImageFolder::open(dir.path(), 4).unwrap().note(), None);

    let mut straight = [f32::NAN; 48];
    let mut flipped = [f32::NAN; 48];
    for index in 0..3 {
        assert_eq!(folder.read(index, false, &mut straight).unwrap(), u32::from(index == 2));
        folder.read(index, true, &mut flipped).unwrap();
        assert_eq!(straight[..4], [1.0, 1.0, -1.0, -1.0], "red of the first row");
        assert_eq!(straight[16..20], [-1.0; 4], "green of the first row");
        assert_eq!(flipped[..4], [-1.0, -1.0, 1.0, 1.0], "red of the first row, mirrored");
        assert_eq!(flipped[32..36], [1.0, 1.0, -1.0, -1.0], "blue of the first row, mirrored");
    }
    assert_eq!(
        open(dir.path().to_str().unwrap(), OpenOptions { image_size: Some(4), ..OpenOptions::default() })
            .unwrap()
            .len(),
        3
    );
}

#[test]
fn grey_transparent_and_jpeg_images_become_rgb() {
    let dir = tempfile::tempdir().unwrap();
    let class = dir.path().join("class");
    std::fs::create_dir(&class).unwrap();
    image::GrayImage::from_pixel(8, 8, image::Luma([51])).save(class.join("a.png")).unwrap();
    image::RgbaImage::from_pixel(8, 8, image::Rgba([51, 51, 51, 0])).save(class.join("b.png")).unwrap();
    RgbImage::from_pixel(8, 8, Rgb([51, 51, 51])).save(class.join("c.jpeg")).unwrap();
    // The name lies: the content decides.
    std::fs::copy(class.join("a.png"), class.join("d.jpg")).unwrap();
    let folder = ImageFolder::open(dir.path(), 8).unwrap();
    for index in 0..4 {
        let mut out = [f32::NAN; 192];
        folder.read(index, false, &mut out).unwrap();
        assert!(out.iter().all(|x| (x + 0.6).abs() <= 0.01), "{}: {out:?}", folder.path(index).display());
    }
}

#[test]
fn a_folder_without_folders_is_one_class() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "b.png", &RgbImage::from_pixel(8, 8, Rgb([255; 3])));
    put(dir.path(), "a.png", &RgbImage::from_pixel(8, 8, Rgb([0; 3])));
    let folder = ImageFolder::open(dir.path(), 8).unwrap();
    assert_eq!((folder.len(), folder.class_names()), (2, &["0".to_string()][..]));
    for (index, value, name) in [(0, -1.0, "a.png"), (1, 1.0, "b.png")] {
        let mut out = [f32::NAN; 192];
        assert_eq!(folder.read(index, false, &mut out).unwrap(), 0);
        assert!(out.iter().all(|&x| x == value) && folder.path(index).ends_with(name));
    }
    assert!(folder.note().unwrap().ends_with("there are no class folders, so all images are of one class"));
}

#[test]
fn folders_that_cannot_be_used_are_refused_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(dir.path()).contains("has no class folders; images are expected as"));
    std::fs::write(dir.path().join("loose.txt"), "no image").unwrap();
    assert!(refusal(dir.path()).contains("has no class folders"));
    put(dir.path(), "loose.png", &picture(8, 8));
    std::fs::create_dir(dir.path().join("cats")).unwrap();
    assert!(
        refusal(dir.path()).contains("cats: is a class folder without PNG, JPEG or WebP images; fill or remove it")
    );
    put(dir.path(), "cats/images/a.png", &picture(8, 8));
    assert!(refusal(dir.path()).contains("images; folders in it are not looked into: give the folder whose folders"));
    assert!(refusal(&dir.path().join("missing")).contains("cannot be read"));
    assert!(refusal(&dir.path().join("loose.png")).contains("cannot be read"));
    put(dir.path(), "cats/a.png", &picture(8, 8));
    assert!(ImageFolder::open(dir.path(), 0).err().unwrap().to_string().contains("image_size is 0"));
    let error = open(dir.path().to_str().unwrap(), OpenOptions::default()).err().unwrap().to_string();
    assert!(error.contains("set image_size"), "{error}");
}

/// They would be its classes.
#[cfg(unix)]
#[test]
fn a_folder_of_links_to_folders_is_not_one_class() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "elsewhere/cat/a.png", &picture(8, 8));
    put(dir.path(), "linked/preview.png", &picture(8, 8));
    std::os::unix::fs::symlink(dir.path().join("elsewhere/cat"), dir.path().join("linked/cat")).unwrap();
    assert!(refusal(&dir.path().join("linked")).contains("has images, and links to folders outside of it"));
    std::fs::remove_file(dir.path().join("linked/preview.png")).unwrap();
    assert!(refusal(&dir.path().join("linked")).contains("has only class folders that are links out of it"));
}

#[cfg(unix)]
#[test]
fn links_lead_inside_only() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    put(outside.path(), "secrets/a.png", &picture(8, 8));
    let dir = tempfile::tempdir().unwrap();
    symlink(outside.path().join("secrets"), dir.path().join("secrets")).unwrap();
    assert!(refusal(dir.path()).contains("only class folders that are links out of it"));
    let links = tempfile::tempdir().unwrap();
    std::fs::create_dir(links.path().join("a")).unwrap();
    symlink(outside.path().join("secrets/a.png"), links.path().join("a/x.png")).unwrap();
    assert!(refusal(links.path()).contains("a: is a class folder whose images are links that lead out of"));
    for (place, image) in [(dir.path(), "secrets/a.png"), (links.path(), "a/x.png")] {
        let folder = ImageFolder::open_with_links(place, 8).unwrap();
        assert_eq!((folder.len(), folder.path(0)), (1, place.join(image)));
        folder.read(0, false, &mut vec![0.0; 3 * 64]).unwrap();
    }
    put(dir.path(), "cats/a.png", &picture(8, 8));
    symlink(dir.path().join("cats/a.png"), dir.path().join("cats/b.png")).unwrap();
    symlink(outside.path().join("secrets/a.png"), dir.path().join("cats/c.png")).unwrap();
    symlink(dir.path().join("nowhere.png"), dir.path().join("cats/d.png")).unwrap();
    let all = ImageFolder::open_with_links(dir.path(), 8).unwrap();
    assert_eq!((all.len(), all.num_classes()), (4, 2));
    assert!(all.note().unwrap().ends_with(": 1 links that lead nowhere were left out"), "{:?}", all.note());
    let folder = ImageFolder::open(dir.path(), 8).unwrap();
    assert_eq!((folder.len(), folder.num_classes()), (2, 1));
    let note = folder.note().unwrap();
    assert!(note.ends_with(": 3 links that lead out of it or nowhere were left out"), "{note}");
    put(dir.path(), "cats/more/e.png", &picture(8, 8));
    std::fs::write(dir.path().join("readme.txt"), "").unwrap();
    let folder = ImageFolder::open(dir.path(), 8).unwrap();
    let left = ": 3 links that lead out of it or nowhere, 1 folders in class folders, 1 files that are no PNG, JPEG or WebP images of a class were left out";
    assert!(folder.len() == 2 && folder.note().unwrap().ends_with(left), "{:?}", folder.note());
}

#[test]
fn damaged_images_are_named_and_never_end_the_program() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["class/a.png", "class/b.jpg", "class/c.webp"] {
        put(dir.path(), name, &picture(40, 40));
    }
    // A folder keeps what it has read.
    let anew = || ImageFolder::open(dir.path(), 8).unwrap();
    let mut out = [f32::NAN; 192];
    for index in 0..3 {
        let path = anew().path(index);
        let whole = std::fs::read(&path).unwrap();
        anew().read(index, false, &mut out).unwrap();
        for cut in [0, 1, 30, whole.len() / 2, whole.len() * 9 / 10] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let error = anew().read(index, false, &mut out).expect_err(&format!("{} cut to {cut}", path.display()));
            assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
        }
        // Whatever one byte becomes: an image or an error.
        for place in (0..whole.len()).step_by(1 + whole.len() / 300) {
            let mut damaged = whole.clone();
            damaged[place] ^= 0xFF;
            std::fs::write(&path, &damaged).unwrap();
            let _ = anew().read(index, false, &mut out);
        }
    }
}

#[test]
fn an_image_that_claims_to_be_huge_is_refused_before_it_is_allocated() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "class/a.png", &picture(8, 8));
    let folder = ImageFolder::open(dir.path(), 8).unwrap();
    let mut bytes = std::fs::read(folder.path(0)).unwrap();
    // Width and height stand in the first chunk, at bytes 16 and 20; its checksum at 29.
    bytes[16..20].copy_from_slice(&100_000u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&1_001u32.to_be_bytes());
    let crc = crc32fast::hash(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    std::fs::write(folder.path(0), &bytes).unwrap();
    let error = folder.read(0, false, &mut [0.0; 192]).unwrap_err().to_string();
    assert!(error.contains("a.png: claims to be 100000x1001 pixels large"), "{error}");
}

#[test]
fn a_corrupt_image_is_counted_and_replaced_by_the_next_good_one() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..5u8 {
        put(dir.path(), &format!("class{i}/image.png"), &RgbImage::from_pixel(8, 8, Rgb([i * 50; 3])));
    }
    std::fs::write(dir.path().join("class2/image.png"), "corrupt").unwrap();
    let labels = |threads| {
        let folder = Arc::new(ImageFolder::open(dir.path(), 8).unwrap());
        let mut loader = Loader::new(folder, LoaderOptions { batch: 5, seed: 3, flip: true, threads }).unwrap();
        let mut labels = Vec::new();
        for step in 0..4 {
            let batch = loader.next(step).unwrap();
            for (sample, &label) in batch.pixels.chunks(192).zip(&batch.labels) {
                assert!(
                    sample.iter().all(|&x| x == (label * 50) as f32 / 127.5 - 1.0),
                    "label {label} has other pixels"
                );
            }
            let mut epoch = batch.labels.clone();
            labels.extend_from_slice(&epoch);
            epoch.sort_unstable();
            assert_eq!(epoch, [0, 1, 3, 3, 4], "image 2 is replaced by image 3");
        }
        assert_eq!(loader.bad_samples(), 1);
        let warnings = loader.take_warnings();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("class2/image.png: is damaged or no image"), "{warnings:?}");
        assert!(loader.take_warnings().is_empty());
        labels
    };
    assert_eq!(labels(1), labels(3));

    for class in ["class0", "class4"] {
        std::fs::write(dir.path().join(class).join("image.png"), "corrupt").unwrap();
    }
    let folder = Arc::new(ImageFolder::open(dir.path(), 8).unwrap());
    let mut loader = Loader::new(folder, LoaderOptions { batch: 5, seed: 3, flip: true, threads: 2 }).unwrap();
    let error = loader.next(0).unwrap_err().to_string();
    assert!(error.contains("3 of 5 samples cannot be read, the last: "), "{error}");
}
