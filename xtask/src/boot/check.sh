# The tracker that `auto` takes is the best that this kernel has.
case $(uname -r) in
6.1.*) wanted=soft-dirty ;;
*) wanted=uffd ;;
esac
floe check | grep -v ' yes ' || exit 1
floe check | grep -q "Changed memory is found by \`$wanted\`" || {
	echo "another tracker than $wanted"
	exit 1
}
floe check --feature mem_dirty_track
