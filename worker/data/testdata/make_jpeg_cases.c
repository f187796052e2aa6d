/* Writes the JPEGs that Pillow cannot write: red, green and blue bytes from standard input, the JPEG to standard output, by libjpeg.
   gcc make_jpeg_cases.c -ljpeg; a.out WIDTH HEIGHT LUMA_SAMPLING CHROMA_SAMPLING IN_SEVERAL_SCANS RESTART_INTERVAL */
#include <stdio.h>
#include <stdlib.h>
#include <jpeglib.h>

int main(int argc, char **argv) {
    struct jpeg_compress_struct jpeg;
    struct jpeg_error_mgr errors;
    jpeg_scan_info scans[3] = {0};
    jpeg.err = jpeg_std_error(&errors);
    jpeg_create_compress(&jpeg);
    jpeg_stdio_dest(&jpeg, stdout);
    if (argc != 7) return 1;
    jpeg.image_width = atoi(argv[1]);
    jpeg.image_height = atoi(argv[2]);
    jpeg.input_components = 3;
    jpeg.in_color_space = JCS_RGB;
    jpeg_set_defaults(&jpeg);
    jpeg_set_quality(&jpeg, 90, TRUE);
    for (int i = 0; i < 3; i++) {
        jpeg.comp_info[i].h_samp_factor = jpeg.comp_info[i].v_samp_factor = atoi(argv[i ? 4 : 3]);
        scans[i].comps_in_scan = 1;
        scans[i].component_index[0] = i;
        scans[i].Se = 63;
    }
    if (atoi(argv[5])) {
        jpeg.scan_info = scans;
        jpeg.num_scans = 3;
    }
    jpeg.restart_interval = atoi(argv[6]);
    jpeg_start_compress(&jpeg, TRUE);
    JSAMPROW row = malloc(3 * jpeg.image_width);
    while (jpeg.next_scanline < jpeg.image_height) {
        if (fread(row, 3, jpeg.image_width, stdin) != jpeg.image_width) return 1;
        jpeg_write_scanlines(&jpeg, &row, 1);
    }
    jpeg_finish_compress(&jpeg);
    return 0;
}
