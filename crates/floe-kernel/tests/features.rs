//! In a process of its own, so that no other test opens descriptors meanwhile.

use floe_kernel::features::{FEATURES, KernelFeatures, ProbeContext};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .expect("own descriptors can be listed")
        .count()
}

fn children() -> String {
    let path = "/proc/thread-self/children";
    std::fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn probing_leaves_no_child_and_no_descriptor() {
    let before = descriptors();
    let features = KernelFeatures::probe();
    assert!(
        features.openat2 && features.madv_guard,
        "this kernel is too old to test on"
    );
    let context = ProbeContext::default();
    for feature in FEATURES {
        feature.present(&context);
    }
    drop(context);
    assert_eq!(descriptors(), before);
    assert_eq!(children(), "");
}
